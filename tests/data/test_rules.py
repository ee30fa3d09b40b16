"""Each rule of what is read, from where, and how it becomes pixels: by the numbers of the issue that asked for it."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import FOUR, both, encoded, fill, gray16, masked, patch, turned, write_tar
from conftest import metrics, tiny
from PIL import Image

from sparsemae.card import InputSpec, ModelCard
from sparsemae.cli import main
from sparsemae.data.images import FORMATS, DefaultRules, as_rgb, decode_rgb
from sparsemae.data.pairs import open_masks, refuse_binary, said_of_classes
from sparsemae.data.record import differences, record
from sparsemae.data.sources import expand_braces, find_source, open_source
from sparsemae.data.splits import Splits
from sparsemae.data.survey import survey
from sparsemae.data.tree import below_shared, by_class, image_files, natural_order
from sparsemae.options import ImageDataConfig, SourceConfig
from sparsemae.tasks.segmentation import scores

pytestmark = pytest.mark.holds("right.1")


def at(root: Path, source: Any = "folder", **options: Any) -> SourceConfig:
    return SourceConfig(source, str(root), **options)


def names(splits: Splits, split: Any = "train") -> set[str]:
    source = splits.open(split)
    return {os.path.relpath(source.filename(i), splits.root) for i in range(len(source))}


@pytest.mark.slow
def test_item_1_names_of_equal_natural_keys_have_an_order_of_their_own(tmp_path: Path) -> None:
    for name in ("1", "01", "Cat", "cat", "10", "2"):
        fill(tmp_path / "train", ["ant"], 2, rename=name)
        fill(tmp_path / "val", ["ant"], 1, rename=name)
    listing = "import sys; from sparsemae.data.sources import *; from sparsemae.options.data import SourceConfig as C; "
    listing += "s = open_source(C('folder', sys.argv[1]), 'train'); print(s.class_names, s.reader.paths)"
    said = {
        subprocess.run(
            [sys.executable, "-c", listing, str(tmp_path)], capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("0", "1", "2")
    }  # fmt: skip
    assert len(said) == 1
    assert said.pop().startswith("['01', '1', '2', '10', 'Cat', 'cat'] ['01/000.jpg', '1/000.jpg', '01/001.jpg'")
    assert natural_order(["b2", "B10", "²", "a"]) == ["a", "b2", "B10", "²"]


def test_item_1_processes_that_found_other_images_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both(tmp_path, ["ant", "bee"])
    source = open_source(at(tmp_path), "train")
    distributed = "sparsemae.data.record.dist."
    monkeypatch.setattr(distributed + "is_initialized", lambda: True)
    monkeypatch.setattr(distributed + "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed + "get_rank", lambda: 0)

    def gathered(others: list[Any], own: Any) -> None:
        others[:] = [own, json.loads(json.dumps(own).replace('"ant", "bee"', '"bee", "ant"'))]

    monkeypatch.setattr(distributed + "all_gather_object", gathered)
    with pytest.raises(
        ValueError, match=r"wanted the same images in all processes, got in 1: 2 classes are now 2, from"
    ):
        record({"train": source}, str(tmp_path))


def test_item_2_every_name_of_a_split_in_any_case(tmp_path: Path) -> None:
    for name in ("val", "Valid", "VALIDATION", "dev", "eval"):
        root = tmp_path / name
        fill(root / "Train", ["ant", "bee"], 3)
        fill(root / name, ["ant", "bee"], 2)
        fill(root / "TEST", ["ant"], 1)
        (root / "docs").mkdir()
        (root / "notes.txt").write_text("mine")
        splits = find_source(at(root))
        assert [len(splits.open(split)) for split in ("train", "val", "test", "all")] == [6, 4, 1, 11]
        assert splits.notes()[0] == (
            f"{root}: training: Train (6 images); validation: {name} (4 images); left for --split test: TEST "
            "(1 images); 2 classes: ant, bee"
        )
    fill(root / "extra" / "deep", ["ant"], 1)
    with pytest.raises(ValueError, match="wanted images in Train, eval, TEST alone, got others in extra"):
        find_source(at(root))
    (root / "extra").rename(root / "dev")
    with pytest.raises(ValueError, match="wanted one folder for val, got dev and eval"):
        find_source(at(root))


def test_item_2_train_must_be_there_to_train(tmp_path: Path) -> None:
    fill(tmp_path / "val", ["ant", "bee"], 2)
    splits = find_source(at(tmp_path))
    assert len(splits.open("val")) == 4
    with pytest.raises(ValueError, match="wanted a split train, got val"):
        splits.open("train")


def test_item_2_tars_say_their_split_or_are_refused(tmp_path: Path) -> None:
    rows = [(f"{name}/{i}.jpg", encoded(patch(name, i))) for name in ("ant", "bee") for i in range(2)]
    for name in ("train-10", "train-9", "Valid", "devkit"):
        write_tar(tmp_path / f"{name}.tar", rows if name != "devkit" else [("readme.txt", b"")])
    splits = find_source(at(tmp_path, "tar"))
    assert splits.notes()[0].endswith(
        "training: train-9.tar and 1 more (8 images); validation: Valid.tar (4 images); 2 classes: ant, bee"
    )
    write_tar(tmp_path / "more.tar", rows)
    with pytest.raises(ValueError, match=r"more\.tar: wanted a name that says its split"):
        find_source(at(tmp_path, "tar"))
    (tmp_path / "more.tar").rename(tmp_path / "train-val.tar")
    with pytest.raises(ValueError, match=r"train-val\.tar: wanted a name that says one split, got train and val"):
        find_source(at(tmp_path, "tar"))


def test_item_3_the_class_is_the_folder_below_the_split(tmp_path: Path) -> None:
    paths = ["ant/2020/a.jpg", "ant/b.jpg", "bee/2020/x/c.jpg"]
    assert by_class(paths)[:2] == (["ant", "bee"], [0, 0, 1])
    assert below_shared([f"set/train/{path}" for path in paths]) == below_shared(paths) == paths
    assert below_shared(["val/ant/1.jpg", "val/ant/2.jpg"]) == ["ant/1.jpg", "ant/2.jpg"]
    assert below_shared(["val/ant/x/1.jpg", "val/ant/y/2.jpg"], ["ant"]) == ["ant/x/1.jpg", "ant/y/2.jpg"]
    assert below_shared(["train/1.jpg", "train/2.jpg"]) == ["1.jpg", "2.jpg"]
    fill(tmp_path / "train", ["ant", "bee"], 2)
    patch("ant", 3).save(tmp_path / "train" / "stray.jpg")
    with pytest.raises(SystemExit):
        main(tiny("finetune", tmp_path / "run", "--data.source", "folder", "--data.root", str(tmp_path)))


def test_item_3_a_tar_in_a_tar_is_a_folder(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        write_tar(tmp_path / "in" / f"{name}.tar", [(f"{year}/1.jpg", encoded(patch(name, 1))) for year in "ab"])
    write_tar(tmp_path / "set" / "train.tar", [(file.name, file.read_bytes()) for file in (tmp_path / "in").iterdir()])
    splits = find_source(at(tmp_path / "set", "tar"))
    assert splits.reader("train").class_names == ["ant", "bee"]
    assert "train.tar/ant.tar/a/1.jpg" in names(splits, "all")


def test_item_4_hidden_names_are_no_images_in_predict_either(tmp_path: Path) -> None:
    for name in ("a.jpg", "._a.jpg", ".x/b.jpg", "__MACOSX/c.jpg", "@eaDir/d.jpg", "z/e.JPG"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        patch("ant", 1).save(tmp_path / name, "JPEG")
    assert [file.name for file in image_files(tmp_path)] == ["a.jpg", "e.JPG"]


def test_item_5_only_the_decoders_of_the_list_are_tried(tmp_path: Path) -> None:
    image = patch("ant", 1)
    for kind in FORMATS:
        assert decode_rgb(io.BytesIO(encoded(image, kind)), "x").size == image.size
    for kind in ("ICO", "TGA", "SGI", "PCX", "EPS"):
        with pytest.raises(ValueError, match="x: unreadable image: not an image in a known format"):
            decode_rgb(io.BytesIO(encoded(image, kind)), "x")


def channel(image: Image.Image) -> list[int]:
    return [int(value) for value in np.asarray(image)[0, :, 0]]


def test_item_6_sixteen_bits_are_scaled_and_alpha_is_composed() -> None:
    wide = Image.fromarray(np.array([[0, 257, 30000, 65535]], np.uint16))
    for kind in ("PNG", "TIFF", "PPM"):
        read = io.BytesIO(encoded(wide, kind))
        assert channel(decode_rgb(read, "x")) == [0, 1, 117, 255]
    assert channel(as_rgb(wide, DefaultRules(bits=12))) == [0, 16, 255, 255]
    assert channel(as_rgb(wide, InputSpec(1, (), ()))) == [0, 255, 255, 255]
    drawn = Image.fromarray(np.array([[[9, 9, 9, 0], [9, 9, 9, 255], [0, 0, 0, 51]]], np.uint8))
    assert channel(as_rgb(drawn)) == [255, 9, 204]
    assert channel(as_rgb(drawn, DefaultRules(background=(0, 0, 0)))) == [0, 9, 0]
    assert channel(as_rgb(drawn, InputSpec(1, (), ()))) == [9, 9, 0]
    key = io.BytesIO(encoded(Image.fromarray(np.array([[3, 7]], np.uint8)), "PNG", transparency=7))
    assert channel(decode_rgb(key, "x")) == [3, 255]
    for mode in ("I", "F"):
        content = io.BytesIO(encoded(Image.new(mode, (2, 2)), "TIFF"))
        with pytest.raises(ValueError, match=f"x: .*wanted 8 or 16 bits a channel, got 32 \\(mode {mode}\\)"):
            decode_rgb(content, "x")


def test_item_6_the_rules_go_with_the_model_and_models_of_before_have_theirs() -> None:
    card = ModelCard("classify", "", {}, InputSpec.of(ImageDataConfig(background=(1, 2, 3), bits=12)))
    spec = ModelCard.from_dict(json.loads(json.dumps(card.to_dict()))).input
    assert (spec.exif, spec.background, spec.bits) == (True, (1, 2, 3), 12)
    before = {**card.to_dict(), "version": 2}
    before["input"] = {name: value for name, value in before["input"].items() if name not in ("background", "bits")}
    spec = ModelCard.from_dict(before).input
    assert (spec.background, spec.bits) == (None, None)


def test_item_6_dark_16_bit_images_and_images_of_one_value_are_said(tmp_path: Path, capsys: Any) -> None:
    gray16(tmp_path, top=4095)
    (said,) = survey(open_source(at(tmp_path), "train"), DefaultRules())
    assert "48 16-bit images have no value above" in said
    assert "--data.bits 12 scales that to white" in said
    assert survey(open_source(at(tmp_path), "train"), DefaultRules(bits=12)) == []
    for file in tmp_path.glob("train/*/*.png"):
        Image.new("L", (32, 32), 7).save(file)
    with pytest.raises(SystemExit):
        main(["check", "--data.root", str(tmp_path), "--data.workers", "0"])
    assert "one value in all of an image: 48 of 68" in capsys.readouterr().err


def test_item_7_links_in_tars_are_read_and_what_cannot_be_is_refused(tmp_path: Path) -> None:
    def written(name: str, kind: bytes, target: str = "", sparse: bool = False) -> SourceConfig:
        file = tmp_path / f"{name}.tar"
        with tarfile.open(file, "w", format=tarfile.GNU_FORMAT) as archive:
            for path in ("ant/1.jpg", "bee/1.jpg"):
                member = tarfile.TarInfo(path)
                content = encoded(patch(path[:3], 1))
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            link = tarfile.TarInfo("bee/2.jpg")
            link.type, link.linkname = kind, target
            archive.addfile(link)
        return at(file, "tar")

    for name, kind, target in (("hard", tarfile.LNKTYPE, "ant/1.jpg"), ("soft", tarfile.SYMTYPE, "../ant/1.jpg")):
        reader = find_source(written(name, kind, target)).reader("train")
        at_link = reader.names.index("bee/2.jpg")
        assert reader[at_link][0].read() == encoded(patch("ant", 1))
        assert reader.class_names[reader[at_link][1]] == "bee"
    with pytest.raises(ValueError, match=r"away\.tar/bee/2\.jpg: wanted a file, or a link to one in the same tar"):
        find_source(written("away", tarfile.SYMTYPE, "/etc/x.jpg"))
    with pytest.raises(ValueError, match=r"pipe\.tar/bee/2\.jpg: wanted a file, got a member of type"):
        find_source(written("pipe", tarfile.FIFOTYPE))


@pytest.mark.skipif(sys.platform != "linux", reason="GNU tar's --sparse")
def test_item_7_sparse_members_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "ant").mkdir()
    with (tmp_path / "ant" / "1.jpg").open("wb") as file:
        file.write(encoded(patch("ant", 1)))
        file.truncate(1 << 20)
    subprocess.run(["tar", "cSf", tmp_path / "x.tar", "-C", tmp_path, "ant"], check=True)
    with pytest.raises(ValueError, match=r"x\.tar/ant/1\.jpg: wanted its bytes in one piece, got a sparse member"):
        find_source(at(tmp_path / "x.tar", "tar"))


def test_item_7_class_numbers_are_names_in_validation_too(tmp_path: Path) -> None:
    for split, numbers in (("train", (999_999_999, 7, 40)), ("val", (40,))):
        members = [(f"{i}.{end}", b"x" if end == "jpg" else str(n).encode())
                   for i, n in enumerate(numbers) for end in ("jpg", "cls")]  # fmt: skip
        write_tar(tmp_path / f"{split}.tar", members)
    train, val = (open_source(at(tmp_path, "wds"), split) for split in ("train", "val"))
    assert train.class_names == val.class_names == ["7", "40", "999999999"]
    assert val.target(val.open(0)[1]) == 1


def test_item_16_brace_patterns_and_columns(tmp_path: Path) -> None:
    assert expand_braces("x-{008..010}{a,b}.tar") == [f"x-{n}{c}.tar" for n in ("008", "009", "010") for c in "ab"]
    for number in (0, 1, 2):
        write_tar(tmp_path / f"x-{number}.tar", [(f"{c}/1.jpg", encoded(patch(c, 1))) for c in ("ant", "bee")])
    splits = find_source(at(tmp_path / "x-{0..1}.tar", "tar"))
    assert len(splits.reader("train")) == 4
    with pytest.raises(ValueError, match=r"no such file: .*x-3\.tar"):
        find_source(at(tmp_path / "x-{2..3}.tar", "tar"))


@pytest.fixture
def flat_run(tmp_path: Path) -> tuple[Path, Path]:
    """A run on a root without splits, and the root."""
    root = tmp_path / "root"
    fill(root, count=10)
    words = ["--data.source", "folder", "--data.root", str(root), "--trainer.global_batch", "12"]
    main(tiny("finetune", tmp_path / "run", *words, "--data.train_images", "36", "--trainer.max_steps", "1"))
    return tmp_path / "run", root


def test_item_8_evaluation_of_a_root_without_splits(flat_run: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    run, root = flat_run

    def evaluated(where: Path, *words: str) -> str:
        capsys.readouterr()
        main(["evaluate", str(run), "--data.source", "folder", "--data.root", str(where), *words])
        printed = capsys.readouterr()
        return printed.out + printed.err

    own = evaluated(root)
    assert "its held-out part, which the model was not trained on" in own
    assert "on 4 images" in own
    root.rename(tmp_path / "moved")
    assert "on 4 images" in evaluated(tmp_path / "moved")
    fill(tmp_path / "other", count=3, start=500)
    other = evaluated(tmp_path / "other")
    assert "all its images: it has no splits" in other
    assert "on 12 images" in other
    assert "on 40 images" in evaluated(tmp_path / "moved", "--split", "all")
    assert "on 36 images" in evaluated(tmp_path / "moved", "--split", "train")
    (tmp_path / "moved").rename(root)
    patch("ant", 99).save(root / "ant" / "new.jpg")
    with pytest.raises(SystemExit):
        evaluated(root)
    assert "the folder has changed since" in capsys.readouterr().err


def test_item_9_turned_pictures_are_turned_without_a_recipe_and_said_with_one(tmp_path: Path) -> None:
    turned(tmp_path)
    assert ImageDataConfig().exif is True
    val = open_source(at(tmp_path), "val")
    (said,) = survey(val, DefaultRules(exif=False))
    assert said.startswith("20 of 20 images have an EXIF orientation")
    assert said.endswith("read as they are stored; --data.exif true turns them upright")
    assert survey(val, DefaultRules())[0].endswith("they are turned upright")


@pytest.mark.parametrize(("way", "stored"), [(3, True), (6, True), (6, False)])
def test_item_9_an_image_and_its_mask_are_turned_together(tmp_path: Path, way: int, stored: bool) -> None:
    classes = np.zeros((20, 30), np.uint8)
    classes[:5, :9] = 1
    exif = Image.Exif()
    exif[0x0112] = way
    pixels = Image.fromarray(np.where(classes[..., None] == 1, 255, 0).astype(np.uint8).repeat(3, 2))
    upright = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270}[way]
    for folder in ("images", "masks"):
        (tmp_path / folder / "train").mkdir(parents=True)
        (tmp_path / folder / "val").mkdir()
    (tmp_path / "classes.txt").write_text("ground\nbox\n")
    for split in ("train", "val"):
        pixels.save(tmp_path / "images" / split / "1.png", exif=exif)
        mask = Image.fromarray(classes)
        (mask if stored else mask.transpose(upright)).save(tmp_path / "masks" / split / "1.png")
    data = at(tmp_path, classes=str(tmp_path / "classes.txt"))
    source = open_masks(data, "train")
    image, target = source.read(0, rules=DefaultRules(exif=True))
    assert ((np.asarray(image)[:, :, 0] == 255) == (target == 1)).all()
    if stored:
        image, target = source.read(0, rules=DefaultRules(exif=False))
        assert ((np.asarray(image)[:, :, 0] == 255) == (target == 1)).all()
    with pytest.raises(ValueError, match=r"wanted data\.exif true or false, got none for 1 images"):
        survey(source, DefaultRules(exif=None))
    with pytest.raises(ValueError, match=f"1.png: wanted data.exif true or false, got none .* orientation is {way}"):
        source.read(0, rules=DefaultRules(exif=None))


CHANGES = {
    "added": lambda root: patch("ant", 77).save(root / "train" / "ant" / "new.jpg"),
    "removed": lambda root: (root / "train" / "ant" / "000.jpg").unlink(),
    "moved": lambda root: (root / "train" / "ant" / "000.jpg").rename(root / "train" / "bee" / "x.jpg"),
    "replaced": lambda root: (root / "train" / "ant" / "000.jpg").write_bytes(encoded(patch("ant", 78).resize((9, 9)))),
    "renamed": lambda root: [(root / s / "ant").rename(root / s / "zebra") for s in ("train", "val")],
    "validation": lambda root: (root / "val" / "ant" / "000.jpg").unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_item_10_a_set_that_changed_is_another(tmp_path: Path, change: str) -> None:
    both(tmp_path, ["ant", "bee"])

    def found() -> dict[str, Any]:
        return record({s: open_source(at(tmp_path), s) for s in ("train", "val")}, str(tmp_path))  # type: ignore[arg-type]

    before = found()
    assert differences(before, found()) == []
    CHANGES[change](tmp_path)
    said = differences(json.loads(json.dumps(before)), found())
    assert said[0] == {
        "added": "train: 24 images are now 25", "removed": "train: 24 images are now 23",
        "moved": "train: images have other names or classes", "replaced": "train: images have other sizes in bytes",
        "renamed": "2 classes are now 2, from number 0 on bee, zebra instead of ant, bee",
        "validation": "val: 10 images are now 9",
    }[change]  # fmt: skip


def test_item_10_a_run_refuses_to_go_on_with_other_images(tmp_path: Path, capsys: Any) -> None:
    both(tmp_path / "root")
    words = ["--data.source", "folder", "--data.root", str(tmp_path / "root"), "--trainer.global_batch", "12"]
    words = tiny("finetune", tmp_path / "run", *words, "--data.train_images", "36")
    main([*words, "--trainer.max_steps", "1"])
    for split in ("train", "val"):
        (tmp_path / "root" / split / "ant").rename(tmp_path / "root" / split / "zebra")
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main([*words, "--trainer.max_steps", "2"])
    assert exit_.value.code == 2
    assert "4 classes are now 4, from number 0 on bee, cat, dog instead of ant, bee, cat" in capsys.readouterr().err
    main([*words, "--trainer.max_steps", "2", "--trainer.resume", "anyway"])
    assert metrics(tmp_path / "run")[-1]["step"] == 2
    assert FOUR[0] == "ant"


def test_item_11_masks_of_0_and_255_or_of_one_stem_twice_are_refused(tmp_path: Path) -> None:
    masked(lambda m: Image.fromarray((m == 1).astype(np.uint8) * 255))(tmp_path)
    data = at(tmp_path, classes=str(tmp_path / "classes.txt"))
    with pytest.raises(ValueError, match=r"got 0 and 255 alone in all 24, .* divide them by 255"):
        refuse_binary(open_masks(data, "train"))
    Image.new("L", (48, 40), 1).save(tmp_path / "masks" / "train" / "007.png")
    refuse_binary(open_masks(data, "train"))
    assert said_of_classes(open_masks(data, "train")) == ["in no training mask: 1 of 3 classes: water"]
    Image.new("L", (48, 40), 1).save(tmp_path / "masks" / "train" / "007.tif")
    with pytest.raises(ValueError, match=r"007\.tif: wanted one file of a name, got 007\.png beside it"):
        open_masks(data, "train")


def test_item_11_a_class_in_no_mask_is_left_out_of_the_mean() -> None:
    means, _ = scores(torch.tensor([[6.0, 0, 2], [0, 4, 0], [0, 0, 0]]))
    assert (means["miou"], means["scored_classes"]) == (pytest.approx((6 / 8 + 1) / 2), 2)


def test_item_11_forms_of_unicode_are_one_class_and_loops_end(tmp_path: Path) -> None:
    class_names, labels, said = by_class(["caf\u00e9/1.jpg", "cafe\u0301/2.jpg", "tea/3.jpg"])
    assert (class_names, labels) == (["caf\u00e9", "tea"], [0, 0, 1])
    assert said[0].startswith("class caf\u00e9: its folders are written in 2 ways")
    fill(tmp_path / "train", ["ant"], 1)
    (tmp_path / "train" / "ant" / "up").symlink_to(tmp_path)
    with pytest.raises(ValueError, match=r"ant/up.*: wanted folders that end, got a link to one that it lies in"):
        find_source(at(tmp_path)).reader("train")
