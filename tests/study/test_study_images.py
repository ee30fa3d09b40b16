"""The image folders of the studies."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image

from sparsemae.cli import main


def made(what: str, source: Path, root: Path) -> dict[str, set[str]]:
    """Files by part and class."""
    subprocess.run([sys.executable, ROOT / "tools/study_images.py", what, source, root], check=True)
    return {
        f"{folder.parent.name}/{folder.name}": {file.name for file in folder.iterdir()} for folder in root.glob("*/*")
    }


@pytest.mark.parametrize(("what", "classes"), [("imagenet", 11), ("imagenet-100", 2)])
@pytest.mark.slow
def test_imagenets_validation_images_are_test_and_50_of_each_class_are_held_out(
    what: str, classes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    for part, count in {"train": 53, "val": 2}.items():
        for name in (f"n{number:08}" for number in range(11)):
            (source / part / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (8, 8)).save(source / part / name / f"{part}_{number}.JPEG")
    found = made(what, source, tmp_path / "root")
    assert len(found) == 3 * classes
    for name in {key.split("/")[1] for key in found}:
        assert len(found[f"train/{name}"]) == 3
        assert len(found[f"val/{name}"]) == 50
        assert found[f"train/{name}"] | found[f"val/{name}"] == {f"train_{number}.JPEG" for number in range(53)}
        assert found[f"test/{name}"] == {"val_0.JPEG", "val_1.JPEG"}
    assert made(what, source, tmp_path / "again") == found
    main(["study", "--config", "study_imagenet", "--root", str(tmp_path / "root"), "--out", str(tmp_path / "out"),
          "--print_commands", "shell"])  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["pretrain"] * 12 + ["finetune"] * 42
