"""Pictures of a pretrained autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from sparsemae.data.classification import load_image
from sparsemae.data.sampling import PICTURE, stream
from sparsemae.data.sources import Source, SourceConfig, open_source
from sparsemae.data.transforms import evaluation_transform, normalize
from sparsemae.models import MaskedAutoencoder
from sparsemae.sparsity import dense_weights


def reconstruction_picture(
    model: MaskedAutoencoder,
    description: dict[str, Any],
    path: Path,
    seed: int = 0,
    images: int = 8,
    source: Source | None = None,
) -> None:
    """Draw originals, masked inputs, and reconstructions by the sparse and by the full latent weights.

    Predicted patches stand where patches were removed, with the target's own mean and spread given back when the
    model predicts normalised patches; kept patches are shown as they are.
    """
    source = source or open_source(SourceConfig(), "val")
    prepared = description["input"]
    transform = evaluation_transform(prepared["img_size"], prepared["interpolation"], prepared["eval_crop"])
    pixels = torch.stack(
        [torch.as_tensor(transform(load_image(source, index, exif=prepared["exif"])[0])) for index in range(images)]
    )
    x = normalize(pixels, prepared["mean"], prepared["std"])
    patches = model.encoder.patch_embed.num_patches
    noise = torch.from_numpy(stream(seed, PICTURE).random((images, patches), np.float32))
    with torch.inference_mode():
        sparse = model(x, description["mask_ratio"], noise)
        with dense_weights(model):
            full = model(x, description["mask_ratio"], noise)
        removed = model.unpatchify(sparse.mask[..., None].expand_as(sparse.pred))
        rows = {
            "original": x,
            "masked": x.masked_fill(removed.bool(), 0.0),
            "sparse weights": torch.where(removed.bool(), model.reconstruct(x, sparse), x),
            "full weights": torch.where(removed.bool(), model.reconstruct(x, full), x),
        }
    figure = Figure(figsize=(images * 1.1, len(rows) * 1.2))
    axes = figure.subplots(len(rows), images, squeeze=False)
    for axis_row, (title, row) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(axis_row, _pixels(row, prepared), strict=True):
            axis.imshow(image)
            axis.set(xticks=[], yticks=[])
        axis_row[0].set_ylabel(title, fontsize=8)
    losses = f"loss {float(sparse.loss):.3f} sparse, {float(full.loss):.3f} full"
    figure.suptitle(f"{description['mask_ratio']:.0%} of the patches removed; {losses}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def _pixels(images: Tensor, prepared: dict[str, Any]) -> np.ndarray:
    """Normalised ``[B, 3, H, W]`` back to ``[B, H, W, 3]`` in 0 to 1."""
    mean, std = (torch.tensor(prepared[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return (images * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()
