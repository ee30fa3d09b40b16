"""Every mistake planted in a set of images and masks is named in one line of its own, with exit status 2."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import scene_folder
from PIL import Image

from sparsemae.cli import main
from sparsemae.data.masks import SCENEPARSE150


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    return scene_folder(tmp_path / "ade", train=3, val=2, longest=64)


def masks(scene: Path, split: str = "training") -> list[Path]:
    return sorted((scene / "annotations" / split).iterdir())


def change(file: Path, to: Callable[[np.ndarray], np.ndarray]) -> None:
    with Image.open(file) as opened:
        values = np.asarray(opened)
    Image.fromarray(to(values)).save(file)


def refused(capsys: pytest.CaptureFixture[str], scene: Path, *options: str) -> tuple[str, str]:
    """The page and the one line of error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(["check", "--masks.source", "sceneparse", "--masks.root", str(scene), "--masks.workers", "0", *options])
    assert exit_.value.code == 2
    printed = capsys.readouterr()
    errors = printed.err.splitlines()
    assert len(errors) == 1, errors
    assert "Traceback" not in printed.err
    return printed.out, errors[0]


def test_a_clean_set_passes(scene: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["check", "--masks.source", "sceneparse", "--masks.root", str(scene), "--masks.workers", "2"])
    printed = capsys.readouterr().out
    assert "nothing would break a run" in printed
    shares = [float(line.split()[-2]) for line in printed.splitlines()[1:151]]
    assert sum(shares) == pytest.approx(100, abs=0.1)
    assert "pairs" in printed


@pytest.mark.holds("ade20k.6")
def test_images_without_masks_and_the_reverse(scene: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = masks(scene)[0]
    gone.unlink()
    page, line = refused(capsys, scene)
    image = scene / "images" / "training" / f"{gone.stem}.jpg"
    assert f"would break a run: 1 images without masks ({image})" in line
    assert f"image without a mask: {image}" in page
    image.unlink()
    (scene / "images" / "validation" / f"{masks(scene, 'validation')[1].stem}.jpg").unlink()
    page, line = refused(capsys, scene)
    assert f"would break a run: 1 masks without images ({masks(scene, 'validation')[1]})" in line
    assert "mask without an image: " in page


@pytest.mark.holds("ade20k.6")
def test_sizes_that_differ(scene: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(masks(scene)[1], lambda mask: mask[:-3])
    page, line = refused(capsys, scene)
    assert f"1 masks that cannot be used ({masks(scene)[1]}: wanted the size of its image, " in line
    assert page.count("wanted the size of its image") == 1


@pytest.mark.holds("ade20k.6")
def test_values_outside_the_range_with_the_hint(scene: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def plant(mask: np.ndarray) -> np.ndarray:
        mask = mask.astype(np.uint16)
        mask[2, 3] = 2_978
        return mask

    change(masks(scene)[2], plant)
    _, line = refused(capsys, scene)
    assert (
        f"({masks(scene)[2]}: label value 2978: wanted 0 to 150, or 255 for ignored; masks of the full ADE20K?" in line
    )


@pytest.mark.holds("ade20k.6")
def test_the_full_ade20k_is_recognized(scene: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(masks(scene)[0], lambda mask: np.stack([mask] * 3, axis=-1))
    assert "got a colour mask: it needs a table in classes; masks of the full ADE20K?" in refused(capsys, scene)[1]
    for file in masks(scene):  # as in the full set's download
        file.rename(scene / "images" / "training" / f"{file.stem}_seg.png")
    (scene / "annotations").rename(scene / "index")
    _, line = refused(capsys, scene)
    assert "wanted the folders images and annotations or masks or labels, got images, index; this is the full" in line


@pytest.mark.holds("ade20k.6")
def test_masks_of_only_0_and_255(scene: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(masks(scene)[0], lambda mask: np.where(mask > 50, 255, 0).astype(np.uint8))
    page, line = refused(capsys, scene)
    assert f"1 masks of only 0 and 255, which is ignored (a binary mask has 0 and 1) ({masks(scene)[0]})" in line
    assert "ignored pixels only" not in line
    assert f"{masks(scene)[0]}: mask of only 0 and 255" in page


@pytest.mark.holds("ade20k.6")
def test_masks_that_are_ignored_whole(scene: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(masks(scene, "validation")[0], np.zeros_like)
    _, line = refused(capsys, scene)
    assert f"1 masks of ignored pixels only ({masks(scene, 'validation')[0]})" in line


@pytest.mark.holds("ade20k.6")
def test_a_zero_label_removed_twice(scene: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("training", "validation"):
        for file in masks(scene, split):
            change(file, lambda mask: mask - 1)  # as bytes: 0 becomes 255
    _, line = refused(capsys, scene)
    assert "the zero label would be removed twice (masks hold 255 and never 150: it has been removed already" in line
    names = ["--masks.source", "folder", "--masks.classes", str(SCENEPARSE150)]
    main(["check", *names, "--masks.root", str(scene), "--masks.workers", "0"])
    assert "nothing would break a run" in capsys.readouterr().out


def test_several_mistakes_are_all_named(scene: Path, capsys: pytest.CaptureFixture[str]) -> None:
    masks(scene)[0].unlink()
    masks(scene)[0].write_text("no mask")
    change(masks(scene)[1], np.zeros_like)
    page, line = refused(capsys, scene)
    for what in ("1 images without masks", "unreadable mask: not an image in a known format", "1 masks of ignored"):
        assert what in line
    assert "no usable pair" not in line
    assert len(page.splitlines()) > 150


def test_options_that_do_not_go_together(scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        "write_exclude: wanted none with images and masks to check" in refused(capsys, scene, "--write-exclude", "x")[1]
    )
    assert "data.root: wanted none with images and masks" in refused(capsys, scene, "--data.root", "x")[1]
    assert "nowhere: no such folder" in refused(capsys, tmp_path / "nowhere")[1]
    assert "ignore_label: wanted 0 to 65535" in refused(capsys, scene, "--masks.ignore_label", "70000")[1]
