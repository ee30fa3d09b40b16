"""A packed file against the run that it was made of."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Figure

from sparsemae.cli import main
from sparsemae.commands.pack import checked_images
from sparsemae.options.data import SourceConfig
from sparsemae.runtime import load
from sparsemae.tasks.loading import load_model


@pytest.mark.holds("packed.2")
@pytest.mark.parametrize(("dtype", "limit"), [("fp32", 1e-4), ("bf16", 4e-2)])
@pytest.mark.slow
def test_a_packed_model_decides_like_its_source(
    runs: Path, tmp_path: Path, dtype: str, limit: float, figure: Figure
) -> None:
    """On real images; 32 features average less of bf16's rounding out than a ViT-Base does."""
    main(["pack", str(runs / "finetune"), str(tmp_path / "packed"), "--dtype", dtype])
    model, card = load_model(runs / "finetune")
    images = torch.cat(list(checked_images(SourceConfig(workers=0), card)))
    with torch.inference_mode():
        wanted = model(images).numpy()
    got = load(tmp_path / "packed")(images.numpy())
    assert np.abs(got - wanted).max() / wanted.std() <= limit
    error = np.abs(got - wanted)[::2].max()  # of one half of the images, held against the other half
    ranked = np.sort(wanted, axis=1)
    clear = ranked[1::2, -1] - ranked[1::2, -2] > 2 * error
    same = got[1::2].argmax(axis=1) == wanted[1::2].argmax(axis=1)
    figure(f"same class for {same.mean():.1%}, for {same[clear].mean():.1%} of the {clear.sum()} clear ones")
    assert clear.any()
    assert same[clear].all()
