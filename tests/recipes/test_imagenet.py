"""The recipes as they stand, at full size, on real JPEGs: three steps on this CPU from each kind of source."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import photographs
import pytest
import yaml
from conftest import Figure, metrics

from sparsemae.config import RECIPES
from sparsemae.models.weights import card_of, find_weights, read_metadata

CHANGED = ["--trainer.max_steps", "3", "--trainer.global_batch", "16", "--trainer.accelerator", "cpu"]


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 photographs as folder, tar and shards; runs go to its folder `runs`, as the recipes say."""
    folder = tmp_path_factory.mktemp("imagenet")
    photographs.make(folder)
    return folder


def run(where: Path, recipe: str, kind: str) -> str:
    """A recipe with nothing changed but steps, batch, device and where the images lie; returns what was said."""
    job = recipe.split("_", maxsplit=1)[0]
    words = [job, "--config", recipe, *CHANGED, "--data.source", kind, "--data.root", kind, "--trainer.resume", "never"]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "sparsemae.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=where, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.holds_only
@pytest.mark.holds("imagenet.1")
@pytest.mark.parametrize("kind", ["folder", "tar", "wds"])
@pytest.mark.parametrize("size", ["t", "s"])
def test_the_recipes_run_as_they_stand(where: Path, size: str, kind: str, figure: Figure) -> None:
    for job in ("pretrain", "finetune"):  # the second starts from the first's run, as its recipe says
        out = where / "runs" / f"{job}_{size}"
        said = run(where, f"{job}_{size}", kind)
        rows = [row for row in metrics(out) if "loss" in row]
        assert [row["step"] for row in rows][-1] == 3
        card = card_of(read_metadata(find_weights(out)), out)
        assert set(card.patterns.values()) == {{"t": "2:32", "s": "4:32"}[size]}
        assert len(card.patterns) == 48
        assert "left over" in said
        recipe = yaml.safe_load((RECIPES / f"{job}_{size}.yaml").read_text())
        resolved = yaml.safe_load((out / "config.yaml").read_text())
        differs = {
            f"{part}.{key}"
            for part in ("trainer", "data", "optim", "model", "sparse")
            for key, value in recipe[part].items()
            if resolved[part][key] != value
        }
        assert differs <= {"trainer.global_batch", "data.source"}
        figure(f"{job}_{size} from {kind}: 3 steps of 16 images, loss {rows[-1]['loss']:.4f}")
    shutil.rmtree(where / "runs")  # 3 GB; the next source starts anew
