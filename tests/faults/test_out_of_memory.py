"""Out of memory on a device: the run ends saying which setting halves the use, and goes on with it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import metrics, tiny

from sparsemae.cli import main
from sparsemae.tasks import pretraining
from sparsemae.training.checkpoint import list_checkpoints, load_checkpoint


@pytest.mark.slow
def test_out_of_memory_names_the_setting_that_halves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], came_out: Any
) -> None:
    normalize, forwards = pretraining.normalize, 0

    def too_much(images: torch.Tensor, *others: Any) -> torch.Tensor:
        nonlocal forwards
        forwards += 1
        if forwards > 2 and len(images) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return normalize(images, *others)

    monkeypatch.setattr(pretraining, "normalize", too_much)
    with pytest.raises(SystemExit) as exit_:
        main(tiny("pretrain", tmp_path / "run"))
    error = capfd.readouterr().err.splitlines()[-1]
    assert "with 16 images per forward: --trainer.device_batch 8 takes about half" in error
    assert "at the same global batch of 16" in error
    (last,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert error.endswith(f"the last checkpoint is {last}")
    assert load_checkpoint(last)[1]["done"] == 2
    main(tiny("pretrain", tmp_path / "run", "--trainer.device_batch", "8", "--trainer.resume", "anyway"))
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    made = "torch's error raised in step 3 for more than 8 images; then continued as the message says"
    came_out("out of memory on a GPU", made, f"{exit_.value.code}, then 0", error)
