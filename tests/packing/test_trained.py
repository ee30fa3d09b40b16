"""int8 files of trained models, by every way to multiply int8 there is here, against the masked fp32 model."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Figure
from PIL import Image

import sparsemae
from sparsemae.cli import main
from sparsemae.data.embedded import EmbeddedReader
from sparsemae.runtime import native


def train_the_demo(run: Path) -> None:
    """The demo's model and recipe, from scratch."""
    main(["finetune", "--config", "demo_finetune", "--trainer.evaluate_every_epochs", "20", "--out", str(run)])


def train_on_own_images(run: Path) -> None:
    """What docs/own-images.md says of a folder, `sparsemae finetune IMAGES`: ViT-Ti, 64 px; fewer epochs."""
    reader, images = EmbeddedReader("train"), run.parent / "images"
    for index, label in enumerate(reader.labels[:400]):
        file = images / str(label) / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(enlarged(reader.pixels[index], 64)).save(file)
    main(["finetune", str(images), "--out", str(run), "--trainer.epochs", "10", "--data.workers", "0"])


def enlarged(pixels: np.ndarray, side: int) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC))


@pytest.mark.holds_only
@pytest.mark.holds("fast.3")
@pytest.mark.parametrize(
    ("train", "count", "learned"), [(train_the_demo, 10_000, 0.6), (train_on_own_images, 4_000, 0.4)]
)
def test_int8_of_a_trained_model_gives_its_classes(
    train: Callable[[Path], None], count: int, learned: float, tmp_path: Path, figure: Figure
) -> None:
    run, reader = tmp_path / "run", EmbeddedReader("val")
    train(run)
    main(["pack", str(run), str(tmp_path / "packed"), "--dtype", "int8"])
    model, labels = sparsemae.load(run), reader.labels[:count]
    prepared = model.card.input
    mean, std = (np.float32(values).reshape(3, 1, 1) for values in (prepared.mean, prepared.std))
    pixels = np.stack([enlarged(image, prepared.img_size) for image in reader.pixels[:count]])
    images = (pixels[:, None].repeat(3, axis=1) / np.float32(255) - mean) / std
    wanted = np.concatenate([model(part) for part in np.array_split(images, 20)])
    top = np.sort(wanted, axis=1)
    assert (wanted.argmax(1) == labels).mean() > learned
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
        assert within > 0.9999  # the bar is all: of the demo's 100,000 logits 2 are beyond it with bf16 beside int8
        assert largest <= 4e-2
