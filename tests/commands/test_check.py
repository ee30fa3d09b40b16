"""Every fault planted is named, and nothing else; the statistics equal numpy's; training takes the list written."""

import shlex
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import metrics, tiny
from PIL import Image

from sparsemae.cli import main
from sparsemae.commands import check_records
from sparsemae.commands.check import ClassReport, _next, examine
from sparsemae.config import read_config
from sparsemae.options import CheckConfig, FinetuneConfig
from sparsemae.options.data import SourceConfig
from sparsemae.training import logs


def found(root: Path, workers: int = 0, **options: Any) -> ClassReport:
    return examine(SourceConfig("folder", str(root), workers=workers), **options)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, str]:
    """Run the command line; its page, and its one line of error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(["check", *words])
    assert exit_.value.code == 2
    printed = capsys.readouterr()
    errors = printed.err.splitlines()
    assert len(errors) == 1, errors
    return printed.out, errors[0]


def test_the_command_to_run_next_reads_what_was_checked() -> None:
    data = SourceConfig("csv", "it.csv", image_column="image_id", label_column="dx", val_share=0.3, bits=12, exif=False)
    said = shlex.split(_next(CheckConfig(data), "classify", "out.txt"))
    assert said[:3] == ["sparsemae", "finetune", "it.csv"]
    config = read_config(FinetuneConfig, said[2:])
    assert replace(data, exclude="out.txt") == SourceConfig(
        **{name: getattr(config.data, name) for name in vars(data) if name != "auto"}
    )
    assert config.out == "runs/finetune"


@pytest.fixture
def spoiled(image_folder: Path) -> Path:
    """One fault of each kind, and files that are none."""
    train, val = image_folder / "train", image_folder / "val"
    (train / "cat" / "0.png").write_bytes(b"")
    broken = train / "cat" / "1.png"
    broken.write_bytes(broken.read_bytes()[:300])
    (train / "cat" / "2.png").write_text("<html>404</html>")
    Image.new("RGB", (40, 15)).save(train / "dog" / "0.png")
    (train / "dog" / "gone.png").symlink_to("nowhere.png")
    shutil.copy(train / "dog" / "1.png", train / "dog" / "copy.png")
    shutil.copy(val / "dog" / "1.png", train / "cat" / "leaked.png")
    (train / "horse").mkdir()
    (train / "cat" / "notes.txt").write_text("mine")
    (train / "dog" / "photo.heic").write_bytes(b"")
    return image_folder


@pytest.mark.parametrize("workers", [0, 2])
def test_every_fault_is_named_and_nothing_else(spoiled: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    report = found(spoiled, workers)
    faults = {str(Path(file.path).relative_to(spoiled / "train")): file.fault for file in report.faulty}
    assert faults == {
        "cat/0.png": "empty", "cat/1.png": "unusable", "cat/2.png": "unusable", "dog/0.png": "too small",
        "dog/gone.png": "unusable",
    }  # fmt: skip
    page = str(report)
    assert "cat/2.png: unreadable image: not an image in a known format" in page
    assert "dog/0.png: wanted at least 16 px, got 40 x 15 px" in page
    assert "dog/gone.png: unreadable image: No such file" in page
    root = spoiled
    assert f"duplicate: {root}/train/dog/1.png = {root}/train/dog/copy.png" in page
    assert (
        "duplicate (leaks from validation into training, in different classes): "
        f"{root}/val/dog/1.png = {root}/train/cat/leaked.png"
    ) in page
    assert len(report.duplicates) == 2
    assert report.counts == {"cat": {"train": 6, "val": 3}, "dog": {"train": 8, "val": 3}}
    assert "folders without images: horse" in page
    assert "2 files are not read: 1 .txt, 1 .heic" in page or "2 files are not read: 1 .heic, 1 .txt" in page
    monkeypatch.setattr(check_records, "LISTED", 1)  # what leaks is shown first
    shown = [line for line in str(report).splitlines() if line.startswith(("duplicate", "..."))]
    assert shown[0].startswith("duplicate (leaks from validation")
    assert shown[1:] == ["... and 1 more such groups"]
    assert len(found(spoiled, smallest=8).faulty) == 4


def test_a_clean_set_passes(image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["check", "--data.root", str(image_folder), "--data.workers", "1"])
    printed = capsys.readouterr().out
    assert "nothing would break a run; 0 groups of duplicates" in printed
    assert "width: 40 to 40 px, median 40" in printed
    assert not found(image_folder).exclude


def test_mean_and_deviation_are_numpys_over_all_pixels_of_train(image_folder: Path) -> None:
    generator = np.random.default_rng(1)
    Image.fromarray(generator.integers(0, 99, (64, 32, 3), dtype=np.uint8)).save(image_folder / "train/cat/wide.png")
    Image.fromarray(generator.integers(0, 99, (20, 20), dtype=np.uint8)).save(image_folder / "train/cat/gray.png")
    images = [Image.open(file).convert("RGB") for file in (image_folder / "train").glob("*/*.png")]
    pixels = np.concatenate([np.asarray(image).reshape(-1, 3) for image in images]) / 255
    report = found(image_folder, 1)
    np.testing.assert_allclose(report.mean, pixels.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(report.std, pixels.std(axis=0), rtol=1e-12)
    assert "height: 20 to 64 px" in str(report)
    assert f"--data.mean '[{report.mean[0]:.4f}, " in str(report)


def test_training_takes_the_list_that_was_written(
    spoiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, root = tmp_path / "exclude.txt", str(spoiled)
    page, line = refused(capsys, "--data.root", root, "--data.workers", "0", "--write-exclude", str(out))
    assert line == (
        f"sparsemae check: error: {root}: would break a run: empty: 1 ({root}/train/cat/0.png: 0 bytes); unusable: 3 "
        f"({root}/train/cat/1.png: unreadable image: image file is truncated); too small: 1 ({root}/train/dog/0.png: "
        "wanted at least 16 px, got 40 x 15 px); also 2 groups of duplicates, 1 across train and val; leave files out "
        f"with --data.exclude {out}"
    )
    listed = out.read_text().splitlines()
    wanted = ["cat/0", "cat/1", "cat/2", "cat/leaked", "dog/0", "dog/copy", "dog/gone"]
    assert listed == [f"train/{name}.png" for name in wanted]
    assert f"wrote {out}: 7 to leave out" in page

    excluding = ["--data.root", root, "--data.exclude", str(out)]
    main(["check", *excluding, "--data.workers", "0", "--write-exclude", str(out)])
    assert "nothing would break a run; 0 groups of duplicates" in capsys.readouterr().out
    assert out.read_text().splitlines() == listed
    words = tiny("finetune", tmp_path / "run", "--data.source", "folder", "--trainer.global_batch", "6", *excluding)
    main([*words, "--data.train_images", "12", "--trainer.max_steps", "2"])
    assert metrics(tmp_path / "run")[-1]["step"] == 2
    main(["evaluate", str(tmp_path / "run"), "--data.source", "folder", *excluding])
    assert "on 6 images" in capsys.readouterr().out


def test_tars_are_checked_like_folders(spoiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (spoiled / "train" / "dog" / "gone.png").unlink()
    root, out = tmp_path / "tars", tmp_path / "exclude.txt"
    root.mkdir()
    for split in ("train", "val"):
        with tarfile.open(root / f"{split}.tar", "w") as archive:
            archive.add(spoiled / split, split)
    names = ["cat/0", "cat/1", "cat/2", "cat/leaked", "dog/0", "dog/copy"]
    where = ["--data.source", "tar", "--data.root", str(root), "--data.workers", "0"]
    page, line = refused(capsys, *where, "--write-exclude", str(out))
    assert "would break a run: empty: 1 (" in line
    assert f"empty: {root}/train.tar/train/cat/0.png: 0 bytes" in page
    assert out.read_text().splitlines() == [f"train.tar/train/{name}.png" for name in names]
    folder, tars = found(spoiled), examine(SourceConfig("tar", str(root)))
    assert (tars.mean, tars.std, tars.counts) == (folder.mean, folder.std, folder.counts)
    main(["check", *where, "--data.exclude", str(out)])


def test_classes_that_would_break_a_run(image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(image_folder / "val" / "cat")
    assert "no images: class cat in val" in str(found(image_folder))
    for file in (image_folder / "train" / "cat").iterdir():
        file.write_bytes(b"")
    assert "no images: class cat in train" in refused(capsys, "--data.root", str(image_folder))[0]
    flat = image_folder / "train" / "dog"
    line = refused(capsys, "--data.root", str(flat), "--data.workers", "0")[1]
    assert "1 class with training images, where finetuning wants two (--task pretrain" in line
    main(["check", "--data.root", str(flat), "--task", "pretrain", "--data.workers", "0"])
    assert "(in no class folder)" in capsys.readouterr().out
    for file in (image_folder / "val" / "dog").iterdir():
        file.write_bytes(b"")
    assert "no usable image in val" in refused(capsys, "--data.root", str(image_folder))[1]
    Image.new("RGB", (40, 40)).save(image_folder / "train" / "stray.png")
    with pytest.raises(ValueError, match=r"train/stray\.png: wanted each image in the folder of its class"):
        found(image_folder)


def test_mistakes(image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = ["--data.root", str(image_folder)]
    assert "nowhere: no such file or folder" in refused(capsys, "--data.root", "nowhere")[1]
    assert "data.source: wanted a data set of yours, got embedded" in refused(capsys, "--data.source", "embedded")[1]
    assert "smallest: wanted at least 1, got 0" in refused(capsys, *root, "--smallest", "0")[1]
    line = refused(capsys, *root, "--write-exclude", str(tmp_path / "no" / "list.txt"))[1]
    assert "wanted a file in a folder that exists" in line


def test_progress_without_a_terminal_is_plain_lines(
    image_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "PLAIN_LINE_SECONDS", 0.0)
    found(image_folder, 1)
    assert "checking: image 22/22, " in capsys.readouterr().err
