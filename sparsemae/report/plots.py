"""A picture of what a pretrained autoencoder reconstructs."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sparsemae.card import ModelCard
from sparsemae.data.splits import Source
from sparsemae.files import replacing
from sparsemae.models import MaskedAutoencoder
from sparsemae.tasks.pretraining import reconstruct

SIDE, MARGIN, FONT_SIZE = 112, 6, 13
"""Of an image, between images, and of the text, px."""


def reconstruction_picture(
    model: MaskedAutoencoder, card: ModelCard, path: Path, source: Source, seed: int = 0, images: int = 8
) -> None:
    """Draw originals, masked inputs, and reconstructions by the kept and by the full latent weights, a row each."""
    shown, font = reconstruct(model, card, source, seed, images), ImageFont.load_default(FONT_SIZE)
    left, top = round(max(map(font.getlength, shown.images))) + 2 * MARGIN, FONT_SIZE + 3 * MARGIN
    size = left + len(shown.files) * (SIDE + MARGIN), top + len(shown.images) * (SIDE + MARGIN)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    draw.text((left, MARGIN), shown.about, "black", font)
    for row, (title, batch) in enumerate(shown.images.items()):
        y = top + row * (SIDE + MARGIN)
        draw.text((MARGIN, y + SIDE // 2), title, "black", font, anchor="lm")
        for column, pixels in enumerate(batch.permute(0, 2, 3, 1).cpu().numpy()):
            image = Image.fromarray(np.ascontiguousarray(pixels)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            picture.paste(image, (left + column * (SIDE + MARGIN), y))
    with replacing(path) as temporary:
        picture.save(temporary, "PNG")
