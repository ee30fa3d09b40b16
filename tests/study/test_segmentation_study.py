"""A study of segmentation, to its end."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from sparsemae.cli import main
from sparsemae.commands.evaluate import evaluate
from sparsemae.options import (
    EvaluateConfig,
    SourceConfig,
)


@pytest.mark.slow
@pytest.mark.holds("better.1")
def test_a_study_of_segmentation(tmp_path: Path) -> None:
    """Masks of two classes, bright or dark; figures are of mIoU, those on test images evaluate's."""
    root, generator = tmp_path / "scenes", np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3), ("test", 4)):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 256, (28, 28), np.uint8)
            Image.fromarray(pixels).save(root / "images" / split / f"{number}.png")
            Image.fromarray((pixels > 128).astype(np.uint8)).save(root / "masks" / split / f"{number}.png")
    (root / "classes.txt").write_text("dark\nbright\n")
    network = {"patch_size": 7, "embed_dim": 32, "depth": 4, "num_heads": 2}
    short = {"trainer.epochs": 1, "optim.warmup_epochs": 0, "trainer.global_batch": 4, "model.args": network,
             "data.train_images": 8, "trainer.precision": "fp32"}  # fmt: skip
    head = {"head.kind": "linear", "trainer.evaluate_every_epochs": 1}
    study = {
        "out": str(tmp_path / "out"), "job": "segment", "root": str(root), "seeds": 1, "selection_seeds": 1,
        "learning_rates": [1e-3, 2e-3], "pretrain": {"config": "demo_pretrain", **short},
        "finetune": {"config": "demo_segment", **short, **head}, "settings": {"few": {}},
        "arms": {"ours": {"pretrain": {}}, "scratch": {}},
    }  # fmt: skip
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    for missing in (root / "classes.txt", root / "masks" / "val"):  # said before the first training
        missing.rename(tmp_path / "away")
        with pytest.raises(SystemExit):
            main(["study", "--config", str(tmp_path / "study.yaml")])
        assert not (tmp_path / "out").exists()
        (tmp_path / "away").rename(missing)
    main(["study", "--config", str(tmp_path / "study.yaml")])
    rows = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    page = (tmp_path / "out/study.md").read_text()
    for row in (row for row in rows if row["test"] is not None):
        jobs = {command[1]: command[command.index("--data.root") + 1] for command in row["commands"]}
        assert jobs == {"segment": str(root)} | ({} if row["arm"] == "scratch" else {"pretrain": f"{root}/images"})
        run = row["commands"][-1][row["commands"][-1].index("--out") + 1]
        config = EvaluateConfig(run, SourceConfig(source="folder", root=str(root)), split="test", accelerator="cpu")
        assert row["test"] == evaluate(config)["miou"]
        assert f"| {row['arm']} | {100 * row['test']:.2f} |" in page
    assert "| arm | mIoU |" in page
    assert "top-1" not in page
