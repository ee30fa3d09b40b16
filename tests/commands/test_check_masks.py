"""Every mistake planted in a set of images and masks is named in one line of its own, with exit status 2."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import scene_folder
from PIL import Image

from sparsemae.cli import main
from sparsemae.data.masks import SCENEPARSE150
from sparsemae.data.pairs import open_masks
from sparsemae.options.data import SourceConfig


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
        main(["check", "--data.source", "sceneparse", "--data.root", str(scene), "--data.workers", "0", *options])
    assert exit_.value.code == 2
    printed = capsys.readouterr()
    errors = printed.err.splitlines()
    assert len(errors) == 1, errors
    assert "Traceback" not in printed.err
    return printed.out, errors[0]


def test_a_clean_set_passes(scene: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["check", "--data.source", "sceneparse", "--data.root", str(scene), "--data.workers", "2"])
    printed = capsys.readouterr().out
    assert "nothing would break a run" in printed
    lines = printed.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("class ")) + 1
    shares = [float(line.split()[-2]) for line in lines[first : first + 150]]
    assert sum(shares) == pytest.approx(100, abs=0.1)
    assert "images with masks, checked as for --task segment" in printed
    assert "pairs" in printed
    assert "groups of duplicates, 2 across train and val" in printed


@pytest.mark.holds("ade20k.6")
def test_images_without_masks_and_the_reverse(scene: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = masks(scene)[0]
    gone.unlink()
    page, line = refused(capsys, scene)
    image = scene / "images" / "training" / f"{gone.stem}.jpg"
    assert f"would break a run: images without masks: 1 ({image})" in line
    assert f"images without masks: {image}" in page
    image.unlink()
    (scene / "images" / "validation" / f"{masks(scene, 'validation')[1].stem}.jpg").unlink()
    page, line = refused(capsys, scene)
    assert f"would break a run: masks without images: 1 ({masks(scene, 'validation')[1]})" in line
    assert "masks without images: " in page


@pytest.mark.holds("ade20k.6")
def test_sizes_that_differ(scene: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(masks(scene)[1], lambda mask: mask[:-3])
    page, line = refused(capsys, scene)
    assert f"unusable: 1 ({masks(scene)[1]}: wanted the size of its image, " in line
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
    change(masks(scene)[0], lambda mask: np.stack([mask, mask, 0 * mask], axis=-1))
    assert "got a color mask: it needs colors in data.classes; masks of the full ADE20K?" in refused(capsys, scene)[1]
    for file in masks(scene):  # as in the full set's download
        file.rename(scene / "images" / "training" / f"{file.stem}_seg.png")
    (scene / "annotations").rename(scene / "index")
    _, line = refused(capsys, scene)
    assert "wanted the folders images and annotations or masks or labels, got images, index; this is the full" in line


@pytest.mark.holds("ade20k.6")
def test_masks_of_only_0_and_255(scene: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(masks(scene)[0], lambda mask: np.where(mask > 50, 255, 0).astype(np.uint8))
    page, line = refused(capsys, scene)
    assert f"mask of only 0 and 255, which is ignored (a binary mask has 0 and 1): 1 ({masks(scene)[0]})" in line
    assert "ignored pixels only" not in line
    assert f"has 0 and 1): {masks(scene)[0]}" in page


@pytest.mark.holds("ade20k.6")
def test_masks_that_are_ignored_whole(scene: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(masks(scene, "validation")[0], np.zeros_like)
    _, line = refused(capsys, scene)
    assert f"mask of ignored pixels only: 1 ({masks(scene, 'validation')[0]})" in line


@pytest.mark.holds("ade20k.6")
def test_a_zero_label_removed_twice(scene: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("training", "validation"):
        for file in masks(scene, split):
            change(file, lambda mask: mask - 1)  # as bytes: 0 becomes 255
    _, line = refused(capsys, scene)
    assert "the zero label would be removed twice (masks hold 255 and never 150: it has been removed already" in line
    names = ["--data.source", "folder", "--data.classes", str(SCENEPARSE150)]
    main(["check", *names, "--data.root", str(scene), "--data.workers", "0"])
    assert "nothing would break a run" in capsys.readouterr().out


def test_several_mistakes_are_all_named(scene: Path, capsys: pytest.CaptureFixture[str]) -> None:
    masks(scene)[0].unlink()
    masks(scene)[0].write_text("no mask")
    change(masks(scene)[1], np.zeros_like)
    page, line = refused(capsys, scene)
    for what in (
        "images without masks: 1",
        "unreadable mask: not an image in a known format",
        "mask of ignored pixels only: 1",
    ):
        assert what in line
    assert "no usable pair" not in line
    assert len(page.splitlines()) > 150


def test_a_folder_says_by_its_layout_that_it_has_masks(scene: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["check", "--data.root", str(scene), "--data.classes", str(SCENEPARSE150), "--data.reduce_zero_label", "true"])
    assert "images with masks, checked as for --task segment" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["check", "--data.root", str(scene)])
    assert "data.classes: wanted a file with one class a line for data.source=folder" in capsys.readouterr().err


def test_training_takes_the_list_that_was_written(
    scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in (scene / "images" / "validation").iterdir():  # else the photographs of both splits are the same
        with Image.open(file) as opened:
            image = opened.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image.save(file)
    out = str(tmp_path / "exclude.txt")
    images = sorted((scene / "images" / "training").iterdir())
    images[0].write_bytes(images[0].read_bytes()[:300])
    masks(scene)[1].unlink()
    data = SourceConfig("sceneparse", str(scene), exclude=out)
    page, line = refused(capsys, scene, "--write-exclude", out)
    assert "images without masks: 1 (" in line
    assert "unusable: 1 (" in line
    assert Path(out).read_text().splitlines() == [str(file.relative_to(scene)) for file in images[:2]]
    assert f"wrote {out}: 2 to leave out" in page
    source = open_masks(data, "train")
    assert [source.filename(i) for i in range(len(source))] == [str(images[2])]
    assert len(open_masks(data, "val")) == 2
    main(["check", "--data.source", "sceneparse", "--data.root", str(scene), "--data.exclude", out])
    assert "nothing would break a run" in capsys.readouterr().out


def test_options_that_do_not_go_together(scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        "data.classes: wanted none for images with masks with data.source=sceneparse"
        in refused(capsys, scene, "--data.classes", str(SCENEPARSE150))[1]
    )
    line = refused(capsys, scene, "--data.source", "tar", "--task", "segment")[1]
    assert "data.source: wanted embedded, folder, sceneparse for images with masks, got tar" in line
    assert "nowhere: no such file or folder" in refused(capsys, tmp_path / "nowhere")[1]
    assert (
        "data.ignore_label: wanted at least 0 and at most 65535"
        in refused(capsys, scene, "--data.ignore_label", "70000")[1]
    )
