"""One picture saved twice is found among others, and other parts of the same photographs are not."""

import io
from pathlib import Path

import numpy as np
import pytest
from conftest import Figure
from photographs import PHOTOGRAPHS, _originals
from PIL import Image

from sparsemae.cli import main
from sparsemae.commands.near_duplicates import _BITS, MOST, fingerprint, near_pairs


def saved(image: Image.Image, quality: int) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return Image.open(io.BytesIO(stream.getvalue())).convert("RGB")


def crops() -> list[Image.Image]:
    """Of each photograph nine parts of half its sides, a quarter of them apart."""
    found = []
    for image in _originals(PHOTOGRAPHS).values():
        width, height = image.size
        for x in range(3):
            for y in range(3):
                box = (x * width // 4, y * height // 4, x * width // 4 + width // 2, y * height // 4 + height // 2)
                found.append(image.crop(box).resize((320, 240)))
    return found


@pytest.mark.slow
@pytest.mark.holds("own.4")
def test_a_picture_at_two_qualities_is_found_and_distinct_crops_are_not(figure: Figure) -> None:
    pictures = [picture for picture in crops() if fingerprint(saved(picture, 50))]
    assert len(pictures) >= 66  # of 72: the rest is night sky
    marks = [[fingerprint(saved(picture, quality)) for picture in pictures] for quality in (50, 60)]
    found = {some: (other, bits) for some, other, bits in near_pairs(*marks)}
    assert {some: other for some, (other, _) in found.items()} == {i: i for i in range(len(pictures))}
    apart = min(
        int(_BITS[np.frombuffer(a, np.uint8) ^ np.frombuffer(b, np.uint8)].sum())
        for i, a in enumerate(marks[0]) for b in marks[0][:i]
    )  # fmt: skip
    figure(f"{len(pictures)} crops: same ones differ in at most {max(bits for _, bits in found.values())} of 256 bits, "
           f"others in {apart} at least")  # fmt: skip
    assert apart > MOST


def test_the_candidates_are_those_of_all_pairs() -> None:
    """Against a look at all pairs, on marks a few bits apart, an empty one among them."""
    generator = np.random.default_rng(0)
    some = [generator.bytes(32) for _ in range(30)] + [b""]
    others = [b""]
    for number, mark in enumerate(some[:-1]):
        bits = np.unpackbits(np.frombuffer(mark, np.uint8))
        bits[generator.permutation(256)[:number]] ^= 1  # 0 to 29 bits
        others.append(np.packbits(bits).tobytes())
    assert near_pairs(some, others) == [(n, n + 1, n) for n in range(MOST + 1)]
    assert near_pairs(some, []) == []


def test_check_names_the_pair_and_ends_with_the_command_to_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = crops()
    for number, (split, name) in enumerate([("train", "cat"), ("train", "dog"), ("val", "cat"), ("val", "dog")]):
        folder = tmp_path / "my images" / split / name
        folder.mkdir(parents=True)
        pictures[10 * number].save(folder / "a.png")
    saved(pictures[0], 60).save(tmp_path / "my images" / "val" / "dog" / "b.jpg", quality=90)
    main(["check", str(tmp_path / "my images"), "--data.workers", "0"])
    lines = capsys.readouterr().out.splitlines()
    (pair,) = (line for line in lines if line.startswith("near-duplicate in validation and training: "))
    assert "val/dog/b.jpg ~ " in pair
    assert "train/cat/a.png (" in pair
    assert "1 near-duplicates (the same picture in gray, or nearly) across them" in lines[-2]
    assert lines[-1] == f"next: sparsemae finetune '{tmp_path}/my images' --out runs/finetune"
