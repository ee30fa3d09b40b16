"""int8 files of a trained model, by every way to multiply int8 there is here, against the masked fp32 model."""

from pathlib import Path

import numpy as np
import pytest
from conftest import Figure

import sparsemae
from sparsemae.cli import main
from sparsemae.data.embedded import EmbeddedReader
from sparsemae.runtime import native


@pytest.mark.holds_only
@pytest.mark.holds("fast.3")
def test_int8_of_a_trained_model_gives_its_classes(tmp_path: Path, figure: Figure) -> None:
    """The demo's model and recipe, from scratch."""
    run, reader = tmp_path / "run", EmbeddedReader("val")
    main(["finetune", "--config", "demo_finetune", "--trainer.evaluate_every_epochs", "20", "--out", str(run)])
    main(["pack", str(run), str(tmp_path / "packed"), "--dtype", "int8"])
    model, labels = sparsemae.load(run), reader.labels
    mean, std = (np.float32(values).reshape(3, 1, 1) for values in (model.card.input.mean, model.card.input.std))
    images = (reader.pixels[:, None].repeat(3, axis=1) / np.float32(255) - mean) / std
    wanted = np.concatenate([model(part) for part in np.array_split(images, 20)])
    top = np.sort(wanted, axis=1)
    assert (wanted.argmax(1) == labels).mean() > 0.6  # it has learned
    ways = [""] + [isa for isa in native.usable_isas() if "vnni" in isa or isa in ("amx", "portable")]
    for isa in ways:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SPARSEMAE_ISA", isa)
            packed = sparsemae.load(tmp_path / "packed")
        got = np.concatenate([packed(part) for part in np.array_split(images, 20)])
        error = np.abs(got - wanted).max(axis=1)
        clear = top[:, -1] - top[:, -2] > 2 * error
        points = 100 * abs((got.argmax(1) == labels).mean() - (wanted.argmax(1) == labels).mean())
        within = (np.abs(got - wanted) <= 3e-2 * wanted.std()).mean()
        largest = error.max() / wanted.std()
        figure(f"{isa or 'chosen'}: {within:.3%} of the logits within 3e-2 of the spread, largest {largest:.1e}; "
               f"{points:.2f} points of top-1")  # fmt: skip
        assert (got.argmax(1) == wanted.argmax(1))[clear].all()
        assert clear.mean() > 0.9
        assert points <= 0.2
        assert within > 0.9999  # the bar is all: a few of 100,000 logits are beyond it with bf16 beside int8
        assert largest <= 5e-2
