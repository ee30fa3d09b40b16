"""Inputs as people have them, each from a public bug report of this field, with what must come of them: one table.

Color patches, one hue a class: a correct run reaches 100 % in seconds, so that a lower figure means that something was
read wrongly.
"""

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

HUES = {"ant": (200, 40, 40), "bee": (40, 200, 40), "cat": (40, 40, 200), "dog": (200, 200, 40), "elk": (200, 40, 200)}
FOUR = tuple(HUES)[:4]
SPLITS = (("train", 12, 0), ("val", 5, 500))
"""Name, images a class, first seed."""
Names = Iterable[str]


@dataclass(frozen=True)
class Case:
    """One input."""

    source: str
    make: Callable[[Path], None]
    figure: float | None = 1.0
    """Top-1, or mIoU; None: refused with status 2 and one line."""
    says: str = ""
    """Pattern of what is said of it, or of the one line."""
    words: tuple[str, ...] = ()
    """More of the command line."""


def patch(name: str, seed: int) -> Image.Image:
    generator = np.random.default_rng(seed + 1000 * list(HUES).index(name))
    noise = generator.normal(0, 25, (32, 40, 3))
    return Image.fromarray((np.array(HUES[name]) + noise).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)  # type: ignore[arg-type]
    return content.getvalue()


def fill(
    folder: Path, classes: Names = FOUR, count: int = 12, start: int = 0, ending: str = "jpg", rename: str = "{}"
) -> None:
    """Class folders, which ``rename`` may put elsewhere."""
    for name in classes:
        (folder / rename.format(name)).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            patch(name, start + i).save(folder / rename.format(name) / f"{i:03d}.{ending}")


def both(root: Path, classes: Names = FOUR, ending: str = "jpg", rename: str = "{}", val: str = "val") -> None:
    for split, count, start in SPLITS:
        fill(root / (split if split == "train" else val), classes, count, start, ending, rename)


def val_lacks(root: Path) -> None:
    fill(root / "train")
    fill(root / "val", ["ant", "dog"], 5, 500)
    (root / "val" / "bee").mkdir()


def roboflow(root: Path) -> None:
    both(root, val="valid")
    fill(root / "test", count=3, start=700)


def kaggle(root: Path) -> None:
    fill(root / "train")
    (root / "test").mkdir()
    for i in range(4):
        patch("ant", 900 + i).save(root / "test" / f"{i}.jpg")


def nested(root: Path) -> None:
    for name in ("ant", "bee"):
        for year in ("2020", "2021"):
            both(root, [name], rename=f"{name}/{year}")


def hidden(root: Path) -> None:
    both(root)
    apple = b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(120)
    for folder in (".ipynb_checkpoints", "ant/.ipynb_checkpoints", "__MACOSX/ant", "@eaDir/ant", "ant/@eaDir"):
        (root / "train" / folder).mkdir(parents=True)
        patch("bee", 1).save(root / "train" / folder / "x.jpg")
    for split in ("train", "val"):
        (root / split / "ant" / "._000.jpg").write_bytes(apple)
        (root / split / "ant" / "Thumbs.db").write_bytes(b"\xd0\xcf")


def ties(root: Path) -> None:
    for name, other in zip(FOUR, ("Cat", "cat", "1", "01"), strict=True):
        both(root, [name], rename=other)


def formats(root: Path) -> None:
    for name, ending in zip(HUES, ("jpg", "webp", "tiff", "JPEG", "bmp"), strict=True):
        both(root, [name], ending)


def names(root: Path) -> None:
    for name, other in zip(FOUR, ("red ant, large", "caf\u00e9", "cafe\u0301 noir", "\u72ac"), strict=True):
        both(root, [name], rename=other)


def unicode_forms(root: Path) -> None:
    both(root, ["ant", "bee"])
    fill(root / "train", ["cat"], 6, rename="caf\u00e9")
    fill(root / "train", ["cat"], 6, 50, rename="cafe\u0301")
    fill(root / "val", ["cat"], 5, 500, rename="cafe\u0301")


def links(root: Path) -> None:
    """Classes are links into a store beside the splits; one link is broken."""
    both(root / "store")
    for split in ("train", "val"):
        (root / split).mkdir()
        for name in FOUR:
            (root / split / name).symlink_to(root / "store" / split / name)
    (root / "store" / "train" / "ant" / "broken.jpg").symlink_to("/nowhere/at/all.jpg")


def loop(root: Path) -> None:
    both(root)
    (root / "train" / "ant" / "again").symlink_to("..")


def odd(root: Path) -> None:
    """Sorts of images that a run takes, and, in ``broken``, that it does not."""
    both(root)
    folder, image = root / "val" / "ant", patch("ant", 1)
    image.convert("CMYK").save(folder / "cmyk.jpg")
    image.convert("P").save(folder / "palette.png")
    see_through = image.convert("RGBA")
    see_through.save(folder / "alpha.png")
    image.save(folder / "gif_inside.jpg", "GIF", save_all=True, append_images=[patch("bee", 2)])
    image.resize((9000, 40)).save(folder / "panorama.jpg")
    image.save(folder / "webp_inside.jpg", "WEBP")
    image.save(folder / "avif_inside.png", "AVIF")


def broken(root: Path) -> None:
    odd(root)
    folder, image = root / "val" / "ant", patch("ant", 3)
    image.resize((1, 1)).save(folder / "one.png")
    image.resize((1, 500)).save(folder / "line.png")
    (folder / "trunc.jpg").write_bytes(encoded(image)[:400])
    (folder / "zero.jpg").write_bytes(b"")
    (folder / "html.jpg").write_bytes(b"<html>404 not found</html>")
    Image.new("F", (32, 32), 0.5).save(folder / "float.tiff")


def turned(root: Path) -> None:
    """Top half red, or bottom half; in validation all stored upside down."""
    up = np.repeat(np.array([[(220, 30, 30)], [(30, 30, 220)]], np.uint8), 40, 0).repeat(32, 1)
    exif = Image.Exif()
    exif[0x0112] = 3
    for split, count, _ in SPLITS:
        for name, pixels in (("redtop", up), ("bluetop", up[::-1])):
            (root / split / name).mkdir(parents=True)
            for i in range(2 * count):
                noise = np.random.default_rng(i).integers(-10, 10, pixels.shape)
                image = Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8))
                file = root / split / name / f"{i}.jpg"
                image.rotate(180).save(file, exif=exif) if split == "val" else image.save(file)


def gray16(root: Path, top: int = 65535) -> None:
    """16-bit gray, whose classes differ by their pattern."""
    y, x = np.mgrid[:32, :32]
    for split, count, _ in SPLITS:
        for name, ramp in (("across", x), ("down", y)):
            (root / split / name).mkdir(parents=True)
            for i in range(2 * count):
                noise = np.random.default_rng(i).integers(0, 2000, (32, 32))
                values = (ramp * 1500 + 6000 + noise) * (top / 65535)
                Image.fromarray(values.astype(np.uint16)).save(root / split / name / f"{i}.png")


def few(root: Path) -> None:
    fill(root / "train", ["ant", "bee"])
    fill(root / "train", ["cat"], 1)
    fill(root / "val", ["ant", "bee"], 4, 500)


def write_tar(file: Path, members: Iterable[tuple[str, bytes]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


Sample = Callable[[str, str, int, bytes], list[tuple[str, bytes]]]
"""Key, class, its number and JPEG to members."""


def shards(sample: Sample, splits: Names = ("train", "val")) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        key = 0
        for split, count, start in SPLITS:
            for shard in range(2 if split in splits else 0):
                members = []
                for i in range(count // 2):
                    for label, name in enumerate(FOUR):
                        content = encoded(patch(name, start + 100 * shard + i))
                        members += sample(f"{key:08d}", name, label, content)
                        key += 1
                write_tar(root / f"set-{split}-{shard:06d}.tar", members)

    return make


def simple(image: str, text: Callable[[str, int], str], ending: str = "cls", key: str = "{}") -> Sample:
    """An image and its class, each by one ending."""
    return lambda k, name, label, jpeg: [
        (f"{key.format(k)}.{image}", jpeg), (f"{key.format(k)}.{ending}", text(name, label).encode())
    ]  # fmt: skip


def number(name: str, label: int) -> str:
    return str(label)


def with_apple(key: str, name: str, label: int, jpeg: bytes) -> list[tuple[str, bytes]]:
    junk = b"\0\5\x16\7" + bytes(60)
    return [(f"._{key}.jpg", junk), (f"{key}.jpg", jpeg), (f"._{key}.cls", junk), (f"{key}.cls", str(label).encode())]


def missing_some(key: str, name: str, label: int, jpeg: bytes) -> list[tuple[str, bytes]]:
    return [(f"{key}.jpg", jpeg)] + [(f"{key}.cls", str(label).encode())] * bool(int(key) % 5)


def two_images(key: str, name: str, label: int, jpeg: bytes) -> list[tuple[str, bytes]]:
    png = encoded(patch("elk", 1), "PNG")
    return [(f"{key}.png", png), (f"{key}.jpg", jpeg), (f"{key}.cls", str(label).encode())]


def same_keys(root: Path) -> None:
    """Keys start again in each shard."""
    for file, count, start in (("train-0", 6, 0), ("train-1", 6, 50), ("val-0", 5, 500)):
        rows = [(f"{i}{label}", name, label, i) for i in range(count) for label, name in enumerate(FOUR)]
        members = [simple("jpg", number)(key, n, c, encoded(patch(n, start + i))) for key, n, c, i in rows]
        write_tar(root / f"{file}.tar", [member for sample in members for member in sample])


def zipped(root: Path) -> None:
    root.mkdir(parents=True)
    with tarfile.open(root / "train-0.tar.gz", "w:gz") as archive:
        archive.add(__file__, "0.jpg")


def tars(top: str, cut: bool = False) -> Callable[[Path], None]:
    """Class folders in a tar of each split, below ``top``."""

    def make(root: Path) -> None:
        for split, count, start in SPLITS:
            where = top.format(split=split)
            rows = [(f"{where}{c}/{i:03d}.jpg", encoded(patch(c, start + i))) for c in FOUR for i in range(count)]
            write_tar(root / f"{split}.tar", rows)
            if cut:
                content = (root / f"{split}.tar").read_bytes()
                (root / f"{split}.tar").write_bytes(content[: len(content) // 2 + 700])

    return make


def one_tar(root: Path) -> None:
    """Both splits in one tar."""
    rows = [
        (f"set/{split}/{name}/{i}.jpg", encoded(patch(name, start + i)))
        for split, count, start in SPLITS for name in FOUR for i in range(count)
    ]  # fmt: skip
    write_tar(root / "all.tar", rows)


def linked_tar(root: Path) -> None:
    """Half of the images are hard links to the other half."""
    for split, count, start in SPLITS:
        folder = root.parent / "unpacked" / split
        fill(folder, count=count, start=start)
        for file in list(folder.glob("*/*.jpg")):
            os.link(file, file.with_name(f"again-{file.name}"))
        root.mkdir(exist_ok=True)
        with tarfile.open(root / f"{split}.tar", "w") as archive:
            archive.add(folder, split)


def parquet(image: str, label: str, kind: str) -> Callable[[Path], None]:
    """HF parquet files, with classes as ClassLabel, text or plain integers."""

    def make(root: Path) -> None:
        import datasets

        root.mkdir(parents=True)
        kinds = {
            "class": datasets.ClassLabel(names=list(FOUR)), "text": datasets.Value("string"),
            "int": datasets.Value("int64"),
        }  # fmt: skip
        for split, count, start in SPLITS:
            rows = [(name, c, i) for c, name in enumerate(FOUR) for i in range(count)]
            columns = {
                image: [{"bytes": encoded(patch(name, start + i)), "path": f"{name}{i}.jpg"} for name, _, i in rows],
                label: [name if kind == "text" else c for name, c, _ in rows],
            }
            features = datasets.Features({image: datasets.Image(), label: kinds[kind]})
            target = root / f"{split if split == 'train' else 'validation'}.parquet"
            datasets.Dataset.from_dict(columns, features=features).to_parquet(str(target))

    return make


def saved(root: Path) -> None:
    root.mkdir(parents=True)
    (root / "dataset_dict.json").write_text('{"splits": ["train"]}')


def image_folder(root: Path) -> None:
    both(root, val="test")


Mask = Callable[[np.ndarray], Image.Image]


def masked(
    mask: Mask = Image.fromarray, ending: str = "png", name: str = "{}", table: str = "ground\nbox\nwater\n",
    layout: str = "{kind}/{split}", void: int | None = None,
) -> Callable[[Path], None]:  # fmt: skip
    """Pictures of a box on the ground beside water; ``void``: a class that is ground in validation."""

    def make(root: Path) -> None:
        for split, count in (("train", 24), ("val", 8)):
            images, masks = (root / layout.format(kind=kind, split=split) for kind in ("images", "masks"))
            images.mkdir(parents=True)
            masks.mkdir(parents=True)
            for i in range(count):
                generator = np.random.default_rng(i + 999 * (split == "val"))
                x, y = generator.integers(4, 18, 2)
                pixels, classes = np.full((40, 48, 3), 90), np.zeros((40, 48), np.uint8)
                pixels[y : y + 16, x : x + 20], classes[y : y + 16, x : x + 20] = (220, 40, 40), 1
                pixels[30:], classes[30:] = (40, 40, 220), 2
                if split == "val" and void is not None:
                    classes[classes == void] = 0
                noisy = (pixels + generator.integers(-15, 15, pixels.shape)).clip(0, 255).astype(np.uint8)
                Image.fromarray(noisy).save(images / f"{i:03d}.jpg")
                mask(classes).save(masks / f"{name.format(f'{i:03d}')}.{ending}")
        (root / "classes.txt").write_text(table)

    return make


def palette(classes: np.ndarray) -> Image.Image:
    image = Image.fromarray(classes).convert("P")
    image.putdata(classes.ravel().tolist())
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    return image


def with_apple_masks(root: Path) -> None:
    masked()(root)
    for folder, name in (("images", "._000.jpg"), ("masks", "._000.png")):
        (root / folder / "train" / name).write_bytes(b"\0\5\x16\7")


def beside_each_other(root: Path) -> None:
    masked()(root)
    Image.new("RGB", (48, 40)).save(root / "images" / "train" / "000.png")


MIOU = 0.7
"""What eight epochs reach at least where masks are read rightly."""
CASES = {
    "val_lacks": Case("folder", val_lacks),
    "roboflow": Case("folder", roboflow, says=r"validation: valid \(20 images\); left for --split test: test \(12"),
    "train_valid": Case("folder", lambda root: both(root, val="Valid"), says=r"validation: Valid \(20 images\)"),
    "train_test": Case("folder", image_folder, says=r"validation: test .* so that the best epoch is chosen by it"),
    "kaggle": Case("folder", kaggle, says="test has no class folders"),
    "nested": Case("folder", nested, says="48 images lie deeper|24 images lie deeper"),
    "hidden": Case("folder", hidden, says=r"1 file is not read: 1 \.db"),
    "ties": Case("folder", ties, says="4 classes: 01, 1, Cat, cat"),
    "formats": Case("folder", formats),
    "webp": Case("folder", lambda root: both(root, ending="webp")),
    "names": Case("folder", names),
    "unicode_forms": Case("folder", unicode_forms, says="class café: its folders are written in 2 ways"),
    "links": Case("folder", links, None, r"broken\.jpg: unreadable image: No such file"),
    "loop": Case("folder", loop, None, "again: wanted folders that end, got a link to one that it lies in"),
    "odd": Case("folder", odd),
    "broken": Case("folder", broken, None, r"(6|5) of \d+ images cannot be used"),
    "exif": Case("folder", turned, words=("--data.exif", "true"), says="10|20 of .* have an EXIF orientation"),
    "gray16": Case("folder", gray16),
    "few": Case("folder", few),
    "wds_ok": Case("wds", shards(simple("jpg", number))),
    "wds_newline_JPEG": Case("wds", shards(simple("JPEG", lambda name, label: f"{label}\n"))),
    "wds_dotslash": Case("wds", shards(simple("jpg", number, key="./{}"))),
    "wds_clsname": Case("wds", shards(simple("jpg", lambda name, label: name)), None, "an integer.*got ant"),
    "wds_json": Case(
        "wds", shards(simple("jpg", lambda name, label: json.dumps({"cls": label}), "json")), None,
        r"wanted its class.*they hold \d+ \.jpg, \d+ \.json",
    ),
    "wds_txt": Case("wds", shards(simple("jpg", lambda name, label: name, "txt")), None, r"they hold .* \.txt"),
    "wds_dotkey": Case("wds", shards(simple("jpg", number, key="IMG.v2_{}")), None, "without dots, got the key IMG"),
    "wds_img_ext": Case("wds", shards(simple("image.jpg", number)), None, r"00000000\.image\.jpg: wanted KEY\.jpg"),
    "wds_negative": Case("wds", shards(simple("jpg", lambda name, label: str(label - 1))), None, "an integer.*got -1"),
    "wds_missing_some": Case("wds", shards(missing_some), None, r"00000000\.jpg: wanted its class"),
    "wds_imgnet_ids": Case(
        "wds", shards(simple("jpg", lambda name, label: str((3, 70, 500, 999)[label]))),
        says="4 classes: 3, 70, 500, 999(.|\n)*4 occur between 3 and 999, with gaps",
    ),
    "wds_float": Case("wds", shards(simple("jpg", lambda name, label: f"{label}.0")), None, r"an integer.*got 0\.0"),
    "wds_index": Case("wds", shards(simple("jpg", number, "index")), None, r"they hold .* \.index"),
    "wds_folders": Case("wds", shards(lambda k, n, c, jpeg: simple("jpg", number)(f"{n}/{k}", n, c, jpeg))),
    "wds_apple": Case("wds", shards(with_apple)),
    "wds_noval": Case("wds", shards(simple("jpg", number), ["train"]), says="4 of them are held out"),
    "wds_same_key": Case("wds", same_keys),
    "wds_two_images": Case("wds", shards(two_images), says="samples have two images, of which one is read"),
    "wds_gz": Case("wds", zipped, None, r"got train-0\.tar\.gz: unpack it"),
    "tar_dotslash": Case("tar", tars("./")),
    "tar_top": Case("tar", tars("{split}/")),
    "tar_pax": Case("tar", tars("a" * 120 + "/café ")),
    "tar_trunc": Case("tar", tars("", cut=True), None, r"train\.tar: wanted a whole, uncompressed tar"),
    "tar_both": Case("tar", one_tar, says=r"training: train \(48 images\); validation: val \(20 images\)"),
    "tar_hard_links": Case("tar", linked_tar, says=r"training: train\.tar \(96 images\)"),
    "hf_ok": Case("hfds", parquet("image", "label", "class")),
    "hf_img": Case("hfds", parquet("img", "fine_label", "class")),
    "hf_string": Case("hfds", parquet("image", "label", "text")),
    "hf_int": Case("hfds", parquet("image", "label", "int"), None, r"--data\.label_column .*label \(int64\)"),
    "hf_imagefolder": Case("hfds", image_folder, says="the only other split"),
    "hf_saved": Case("hfds", saved, None, "got one of save_to_disk"),
    "seg_ok": Case("masks", masked(), MIOU, "over 3 of 3 classes"),
    "seg_255": Case(
        "masks", masked(lambda m: Image.fromarray((m == 1).astype(np.uint8) * 255), table="ground\nbox\n"), None,
        "0 and 255 alone.*divide them by 255",
    ),
    "seg_gray_rgb": Case("masks", masked(lambda m: Image.fromarray(np.dstack([m] * 3))), MIOU),
    "seg_scaled": Case("masks", masked(lambda m: Image.fromarray(m * 127)), None, "label value 127: wanted 0 to 2"),
    "seg_tif": Case("masks", masked(ending="tif"), MIOU),
    "seg_jpgmask": Case("masks", masked(ending="jpg"), None, "24 masks are JPEG or WebP, which change the values"),
    "seg_suffix": Case("masks", masked(name="{}_mask"), None, r"000\.jpg and 000_mask\.png"),
    "seg_onebased": Case("masks", masked(lambda m: Image.fromarray(m + 1)), None, "label value 3: wanted 0 to 2"),
    "seg_val_void": Case("masks", masked(void=2), 0.5, r"over 2 of 3 classes.*in none of their masks: water"),
    "seg_la": Case("masks", masked(lambda m: Image.fromarray(m).convert("LA")), MIOU),
    "seg_16": Case("masks", masked(lambda m: Image.fromarray(m.astype(np.uint16))), MIOU),
    "seg_palette": Case("masks", masked(palette), MIOU),
    "seg_apple": Case("masks", with_apple_masks, MIOU),
    "seg_beside": Case("masks", beside_each_other, None, r"000\.png: wanted one file of a name, got 000\.jpg"),
    "seg_split_first": Case("masks", masked(layout="{split}/{kind}"), None, "wanted the folders images and"),
}  # fmt: skip
