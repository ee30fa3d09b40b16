"""Pictures of a pretrained autoencoder."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from sparsemae.card import InputSpec, ModelCard
from sparsemae.data import sampling, sources, transforms
from sparsemae.data.splits import Source
from sparsemae.files import replacing
from sparsemae.models import MaskedAutoencoder
from sparsemae.options import SourceConfig
from sparsemae.sparsity import dense_weights


def reconstruction_picture(
    model: MaskedAutoencoder,
    card: ModelCard,
    path: Path,
    seed: int = 0,
    images: int = 8,
    source: Source | None = None,
) -> None:
    """Draw originals, masked inputs, and reconstructions by the sparse and by the full latent weights.

    Masked patches are shown as predicted, with the target's own mean and standard deviation given back when the model
    predicts normalized patches; kept patches are shown as they are.
    """
    source = source or sources.open_source(SourceConfig(), "val")
    spec, ratio = card.input, card.settings["mask_ratio"]
    transform = transforms.evaluation_transform(spec)
    pixels = torch.stack([transform(*source.read(index, rules=spec))[0] for index in range(images)])
    x = transforms.normalize(pixels, spec.mean, spec.std)
    shape = images, model.encoder.patch_embed.num_patches
    noise = torch.from_numpy(sampling.stream(seed, sampling.PICTURE).random(shape, np.float32))
    with torch.inference_mode():
        sparse = model(x, ratio, noise)
        with dense_weights(model):
            full = model(x, ratio, noise)
        masked = model.unpatchify(sparse.mask[..., None].expand_as(sparse.pred)).bool()
        rows = {
            "original": x,
            "masked": x.masked_fill(masked, 0.0),
            "sparse weights": torch.where(masked, model.reconstruct(x, sparse), x),
            "full weights": torch.where(masked, model.reconstruct(x, full), x),
        }
    figure = Figure(figsize=(images * 1.1, len(rows) * 1.2), layout="tight")
    axes = figure.subplots(len(rows), images, squeeze=False)
    for axis_row, (title, row) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(axis_row, _pixels(row, spec), strict=True):
            axis.imshow(image)
            axis.set(xticks=[], yticks=[])
        axis_row[0].set_ylabel(title, fontsize=8)
    figure.suptitle(
        f"{ratio:.0%} of the patches masked; loss {float(sparse.loss):.3f} sparse, {float(full.loss):.3f} full",
        fontsize=9,
    )
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def _pixels(images: Tensor, spec: InputSpec) -> np.ndarray:
    """Normalized ``[B, 3, H, W]`` back to ``[B, H, W, 3]`` in 0 to 1."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (spec.mean, spec.std))
    return (images * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()
