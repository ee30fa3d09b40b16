"""Checkpoints of other versions, other defaults, other machines: migrated, compared, or refused, never misread."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import tiny
from safetensors import safe_open
from safetensors.torch import save_file

from sparsemae.cli import main
from sparsemae.jobs import JOBS
from sparsemae.models.weights import read_metadata, read_weights
from sparsemae.options.tasks import PretrainConfig
from sparsemae.training import fit, run as run_module


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run stopped at step 3 of 6, and ``whole`` beside it."""
    folder = tmp_path_factory.mktemp("versions")
    main(tiny("pretrain", folder / "whole"))
    main(tiny("pretrain", folder / "run", "--trainer.max_steps", "3"))
    return folder


@pytest.fixture
def stopped(original: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(original / "run", tmp_path / "run")
    return tmp_path / "run"


def counters(run: Path) -> dict[str, Any]:
    return read_metadata(run / "checkpoints" / "step-00000003" / "training.safetensors")


def rewrite(run: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Other counters in the run's checkpoint, its checksums made to fit."""
    path = run / "checkpoints" / "step-00000003"
    file, said = path / "training.safetensors", counters(run)
    change(said)
    with safe_open(file, framework="pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    save_file(tensors, file, {"sparsemae": json.dumps(said)})
    sums = {each.name: sha256(each.read_bytes()).hexdigest() for each in path.glob("*.safetensors")}
    (path / "sha256.json").write_text(json.dumps(sums))
    return path


def refused(words: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """The last line of a run that is refused."""
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 2
    return capfd.readouterr().err.splitlines()[-1]


def equal(one: Path, other: Path) -> bool:
    a, b = read_weights(one)[0], read_weights(other)[0]
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.holds("held.1")
def test_13_a_checkpoint_says_its_version_its_configuration_and_its_packages(stopped: Path) -> None:
    said = counters(stopped)
    assert said["version"] == 2
    assert said["config"] == json.loads(json.dumps(yaml.safe_load((stopped / "config.yaml").read_text())))
    assert said["config"]["trainer"]["precision"] == "fp32"
    assert said["config"]["trainer"]["device_batch"] == 16
    assert said["packages"].items() >= {name: version(name) for name in ("torch", "timm")}.items()


@pytest.mark.holds("held.1")
def test_13_a_checkpoint_of_version_1_is_migrated(original: Path, stopped: Path) -> None:
    def age(said: dict[str, Any]) -> None:
        said["booked"] = said.pop("logged_through")
        for name in ("version", "config", "packages"):
            del said[name]

    rewrite(stopped, age)
    config = yaml.safe_load((stopped / "config.yaml").read_text())
    config["trainer"]["precision"] = "auto"
    (stopped / "config.yaml").write_text(yaml.safe_dump(config))
    main(tiny("pretrain", stopped))
    assert equal(original / "whole", stopped)


@pytest.mark.holds("held.1")
def test_13_a_newer_one_is_refused_by_the_version_that_wrote_it_and_kept(
    stopped: Path, capfd: pytest.CaptureFixture[str], came_out: Any
) -> None:
    path = rewrite(stopped, lambda said: said.update(version=99, packages={"sparsemae": "9.9.9"}))
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    said = refused(tiny("pretrain", stopped), capfd)
    assert f"{path}: wanted a checkpoint of version 1 to 2, got version 99, written by sparsemae 9.9.9" in said
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert [kept.name for kept in path.parent.iterdir()] == [path.name]
    came_out("checkpoint of a newer version", "its version set to 99, its checksums made to fit", 2, said)


@pytest.mark.holds("held.1")
def test_13_a_changed_default_is_compared_with_what_the_run_used(
    stopped: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also where config.yaml is gone, or says what a later start wanted."""

    @dataclass
    class Newer(PretrainConfig):
        dense_loss_weight: float = 0.25

    monkeypatch.setitem(JOBS, "pretrain", JOBS["pretrain"]._replace(options=Newer))
    assert "dense_loss_weight was 0.0, is 0.25" in refused(tiny("pretrain", stopped), capfd)
    config = yaml.safe_load((stopped / "config.yaml").read_text())
    (stopped / "config.yaml").write_text(yaml.safe_dump({**config, "dense_loss_weight": 0.25}))
    assert "dense_loss_weight was 0.0, is 0.25" in refused(tiny("pretrain", stopped), capfd)
    (stopped / "config.yaml").unlink()
    assert "dense_loss_weight was 0.0, is 0.25" in refused(tiny("pretrain", stopped), capfd)


@pytest.mark.holds("held.1")
def test_13_auto_is_what_it_came_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Continued on a machine where trainer.precision=auto is another number format."""
    words = tiny("pretrain", tmp_path / "run", "--trainer.precision", "auto", "--trainer.max_steps", "1")
    monkeypatch.setattr(run_module, "resolved_precision", lambda trainer: "fp32")
    main(words)
    monkeypatch.setattr(run_module, "resolved_precision", lambda trainer: "bf16")
    assert "trainer.precision was fp32, is bf16" in refused(words, capfd)


@pytest.mark.holds("held.1")
def test_13_another_torch_or_timm_is_said(
    original: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    versions = {**fit.package_versions(), "torch": "9.0.0", "timm": "9.1.0"}
    monkeypatch.setattr(fit, "package_versions", lambda: versions)
    main(tiny("pretrain", stopped))
    said = capfd.readouterr().err
    before = counters(original / "run")["packages"]
    for name in ("torch", "timm"):
        assert f"warning: {name} was {before[name]} and is {versions[name]}" in said
    assert said.count("warning: ") == 2
    assert equal(original / "whole", stopped)
