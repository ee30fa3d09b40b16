"""`trainer.patience`: a run that no longer gets better ends, and ends the same way when it was interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import metrics, tiny

from sparsemae.cli import main
from sparsemae.models.weights import read_weights
from sparsemae.tasks.classification import Classification

PEAK = [0.1, 0.4, 0.3, 0.35, 0.2, 0.9]
"""Top-1 of each epoch; nobody waits for the last."""


@pytest.mark.slow
def test_a_run_ends_when_its_patience_does_however_often_it_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def evaluate(task: Classification, *_: Any) -> dict[str, float]:
        steps = [0, *(row["step"] for row in metrics(Path(task.config.out)) if "lr" in row)]
        return {"top1": PEAK[min(steps[-1] // 2, 5)], "top5": 1.0, "standard_error": 0.0}  # it comes before its line

    monkeypatch.setattr(Classification, "evaluate", evaluate)
    options = ["--trainer.epochs", "6", "--trainer.evaluate_every_epochs", "1", "--trainer.patience", "3"]
    (tmp_path / "whole").mkdir()
    main(tiny("finetune", tmp_path / "whole", *options))
    said = capsys.readouterr().err
    assert "ended at epoch 5 by trainer.patience 3: no evaluation was better than that of epoch 2" in said
    assert [row["top1"] for row in metrics(tmp_path / "whole") if "top1" in row] == PEAK[:5]
    result = json.loads((tmp_path / "whole/result.json").read_text())
    assert (result["kept"], result["epochs"], result["best"]) == (5, 5, 2)  # a recipe keeps the last
    main(tiny("finetune", tmp_path / "parts", *options, "--trainer.max_steps", "7"))
    for _ in range(2):  # the second has nothing to do
        main(tiny("finetune", tmp_path / "parts", *options))
    whole, parts = (read_weights(tmp_path / name)[0] for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    steps = [row["step"] for row in metrics(tmp_path / "parts") if "lr" in row]
    assert steps == list(range(1, 11))
