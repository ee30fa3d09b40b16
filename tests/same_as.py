"""Is what is computed still what it was at another commit? Trains and packs in both trees and compares every tensor.

    python tests/same_as.py COMMIT

The old tree is a git worktree of COMMIT, the new one a copy of the working tree that this script lies in, changes that
are not committed included. Both run the same commands, each in a process of its own on one thread, with everything
random switched on; the native module is shared where native/ is unchanged, and else built for both. Compared bit for
bit, type and shape included: every tensor of every weights file, checkpoint (moments, masks, averages) and packed file,
the logits of the packed files on every instruction set of this machine, the masks that segmenters draw, and the numbers
of metrics.jsonl. Metadata may differ. Exit status 1 at the first difference, 2 if a side could not run.

To see it notice one: ``--new-options "--seed 1"``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
RENAMED = {"--taps": "--out_indices"}
"""Options whose spelling has changed, old to new: each side takes the one that its ``--help`` knows."""
NATIVE = ("native", "CMakeLists.txt")
"""What the native module is built from."""
UNCOMPARED = {"images_per_second"}
"""Numbers of metrics.jsonl that are times."""
ISAS = ("portable", "avx2", "avx512", "avx512bf16", "avx512fp16", "amx")

TRAINING = [
    "--data.img_size", "32", "--model.args", "{patch_size: 8, embed_dim: 32, depth: 4, num_heads: 2}",
    "--model.drop_path", "0.3", "--sparse.pattern", "2:16", "--optim.lr", "2e-3", "--optim.layer_decay", "0.75",
    "--optim.clip_grad", "1.0", "--optim.warmup_epochs", "1", "--trainer.epochs", "3", "--trainer.global_batch", "8",
    "--trainer.device_batch", "4", "--trainer.ema_decay", "0.9", "--trainer.log_every_steps", "1",
    "--trainer.save_every_steps", "3", "--trainer.keep_checkpoints", "9", "--trainer.accelerator", "cpu",
]  # fmt: skip
"""Of all jobs: 6 steps, 2 an epoch, each of 2 micro-batches; checkpoints in mid-epoch, the best ones, and the last."""
JOBS = {
    "pretrain": ["--decoder", "{embed_dim: 16, depth: 1, num_heads: 2}", "--mask_ratio", "0.5"],
    "finetune": [
        "--mixup", "0.8", "--cutmix", "1.0", "--erasing", "0.5", "--label_smoothing", "0.1",
        "--data.auto_augment", "rand-m9-mstd0.5-inc1",
    ],
    "segment": [
        "--taps", "[0, 1, 2, 3]", "--head.width", "8", "--head.auxiliary_width", "8", "--head.dropout", "0.1",
        "--data.short_side", "32", "--data.long_side", "128", "--data.photometric", "true",
        "--data.classes", "../data/scenes/classes.txt", "--optim.schedule", "linear", "--optim.warmup_steps", "null",
        "--trainer.steps", "null",
        "--inference.stride", "16", "--inference.scales", "[1.0, 1.5]", "--inference.flip", "true",
    ],
}  # fmt: skip
GRADIENT, DECOUPLED = ["--sparse.strength", "1e-3"], ["--sparse.term", "decoupled", "--sparse.strength", "0.5"]
GRADUAL = ["--sparse.schedule", "gradual", "--sparse.gradual_epochs", "1.5", "--sparse.freeze_epoch", "2"]
WARM_UP = ["--sparse.dense_epochs", "1.5"]
KINDS = {
    ("fp32", 0): [*GRADIENT, *GRADUAL],
    ("fp64", 2): [*GRADIENT, *WARM_UP],
    ("fp32", 2): [*DECOUPLED, *WARM_UP],
    ("fp64", 0): [*DECOUPLED, *GRADUAL],
    ("bf16", 0): [*DECOUPLED, *GRADUAL],
}
"""Of each job, a run by precision and number of loader processes."""


class Step(NamedTuple):
    """One command of both sides, in the old spelling."""

    name: str
    """A folder of its own below the side's: what it writes is compared under that name."""
    words: list[str]


def steps() -> list[Step]:
    """All commands, in an order in which each finds what it starts from."""
    found = []
    for job, words in JOBS.items():
        for (precision, workers), sparse in KINDS.items():
            name = f"{job}-{precision}-{workers}"
            options = ["--trainer.precision", precision, "--data.workers", str(workers), *sparse]
            source = [
                "--data.source",
                "folder",
                "--data.root",
                "../data/scenes" if job == "segment" else "../data/images",
            ]
            if job == "pretrain" and "--sparse.dense_epochs" in sparse:
                options += ["--dense_loss_weight", "0.5"]
            if job == "pretrain" and precision == "bf16":
                source = ["--data.source", "embedded", "--data.train_images", "16", "--data.crop", "shift"]
            if job == "finetune" and workers:
                source[1], source[3] = "tar", "../data/tars"
            if job != "pretrain" and precision != "fp64":
                options += ["--init", f"pretrain-{precision}-{workers}"]
            if job == "segment":
                options += ["--inference.mode", "slide" if workers else "whole"]
            found.append(Step(name, [job, "--out", name, *TRAINING, *words, *source, *options]))
    finetuned = [step.name for step in found if step.words[0] == "finetune"]
    for run in finetuned:
        for dtype in ("bf16", "fp32", "int8"):
            name = f"pack-{run.removeprefix('finetune-')}-{dtype}"
            found.append(Step(name, ["pack", run, f"{name}/packed.safetensors", "--dtype", dtype]))
    for run in [step.name for step in found if step.words[0] == "segment"]:
        found.append(Step(f"predict-{run}", ["predict", run, "../data/scenes/images/val", "--out", f"predict-{run}"]))
    return found


def make_data(folder: Path) -> None:
    """Photograph-like noise in two classes, as JPEGs in folders and in tars, and scenes with masks of four classes."""
    draw = np.random.default_rng(0)

    def soft(width: int, height: int) -> Image.Image:
        coarse = Image.fromarray(draw.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        fine = draw.integers(-20, 21, (height, width, 3))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
        return Image.fromarray((smooth + fine).clip(0, 255).astype(np.uint8))

    for split, count in (("train", 8), ("val", 4)):
        for label in ("cat", "dog"):
            (folder / "images" / split / label).mkdir(parents=True)
            for i in range(count):
                soft(40 + 3 * i, 60 - 2 * i).save(folder / "images" / split / label / f"{i}.jpg", quality=90)
        (folder / "tars").mkdir(exist_ok=True)  # of their own: beside class folders f31ab9b took both for one split
        with tarfile.open(folder / "tars" / f"{split}.tar", "w") as archive:
            archive.add(folder / "images" / split, ".")
        for kind in ("images", "masks"):
            (folder / "scenes" / kind / split).mkdir(parents=True)
        for i in range(2 * count):
            width, height = 48 + i, 40 + 2 * i
            soft(width, height).save(folder / "scenes" / "images" / split / f"{i:02d}.jpg", quality=90)
            values = draw.choice([0, 1, 2, 3, 255], (5, 5), p=[0.3, 0.25, 0.2, 0.15, 0.1]).astype(np.uint8)
            mask = Image.fromarray(values).resize((width, height), Image.Resampling.NEAREST)
            mask.save(folder / "scenes" / "masks" / split / f"{i:02d}.png")
    (folder / "scenes" / "classes.txt").write_text("sky\ntree\nroad\nhouse\n")


def run_side(plan: list[Step]) -> None:
    """All commands of one tree in the current folder, and the logits of its packed files. Called as ``--side FILE``."""
    import torch

    from sparsemae.cli import main

    def cast(module: torch.nn.Module, inputs: tuple[Any, ...]) -> Any:
        double = isinstance(module, torch.nn.Conv2d) and module.weight.dtype == torch.float64
        return (inputs[0].double(),) if double else None

    torch.set_num_threads(1)
    # f31ab9b evaluates fp64 models on fp32 images, which torch refuses
    torch.nn.modules.module.register_module_forward_pre_hook(cast)
    for step in plan:
        print(f"== {step.name}", flush=True)
        if step.words[0] == "pack":
            Path(step.name).mkdir()
        main(spelled(step.words))
        if step.words[0] == "pack":
            save_logits(Path(step.name) / "packed.safetensors")


def spelled(words: list[str]) -> list[str]:
    """A command in this side's own spelling."""
    from sparsemae.cli import main

    if not RENAMED.keys() & {*words}:
        return words
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        main([words[0], "--help"])
    known = printed.getvalue()
    return [word if f"{word} " in known else RENAMED.get(word, word) for word in words]


def save_logits(packed: Path) -> None:
    """Logits of random images by a packed file, on each instruction set that this machine has, beside the file."""
    from safetensors.numpy import save_file

    from sparsemae.runtime import load

    images = np.random.default_rng(1).standard_normal((3, 3, 32, 32)).astype(np.float32)
    logits = {}
    for isa in ISAS:
        os.environ["SPARSEMAE_ISA"] = isa
        with contextlib.suppress(ValueError):
            logits[isa] = load(packed, threads=1)(images)
    del os.environ["SPARSEMAE_ISA"]
    assert "portable" in logits
    save_file(logits, packed.with_name("logits.safetensors"))


def make_trees(commit: str, folder: Path) -> None:
    """``folder/old`` and ``folder/new``: the package at the commit and as it is now, each with its native module."""
    git("worktree", "add", "--quiet", "--detach", str(folder / "old"), commit)
    for name in git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0"):
        if name and (ROOT / name).is_file() and not name.startswith(("tests/", "docs/")):
            (folder / "new" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "new" / name)
    same = native_sources(folder / "old") == native_sources(folder / "new")
    for side in ("old", "new"):
        module = installed_module() if same else build(folder / side, folder / f"{side}-lib")
        shutil.copy(module, folder / side / "sparsemae" / "runtime")
    print(f"native module: {'shared, its sources are equal' if same else 'built for each side'}", flush=True)


def git(*words: str) -> str:
    """Output of a git command in this script's tree."""
    return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def native_sources(tree: Path) -> dict[str, bytes]:
    """Everything that the native module is built from, by path."""
    files = [file for name in NATIVE for file in [tree / name, *sorted((tree / name).rglob("*"))] if file.is_file()]
    return {str(file.relative_to(tree)): file.read_bytes() for file in files if file.suffix != ".md"}


def installed_module() -> Path:
    """The native module of the environment that runs this script."""
    code = "import sparsemae.runtime.native as module; print(module.FILE)"
    words = [sys.executable, "-c", code]
    return Path(subprocess.run(words, check=True, capture_output=True, text=True, cwd=ROOT).stdout.strip())


def build(tree: Path, target: Path) -> Path:
    """Build a tree's native module with pip, with this environment's build tools where it has them."""
    probe = subprocess.run(
        [sys.executable, "-c", "import nanobind, scikit_build_core"], check=False, capture_output=True
    )
    isolation = ["--no-build-isolation"] if probe.returncode == 0 else []
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *isolation, "--target"]
    subprocess.run([*pip, str(target), str(tree)], check=True)
    runtime = target / "sparsemae" / "runtime"
    return next(file for name in ("libsparsemae*", "_native*.so") for file in runtime.glob(name))


def python_of(side: Path) -> Path:
    """An interpreter that sees a tree, then this one's packages, but none of its .pth files (editable installs)."""
    home = side.with_name(f"{side.name}-venv")
    venv.create(home, with_pip=False, symlinks=True)
    packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    site = next(home.glob("lib/python*/site-packages"))
    (site / "tree.pth").write_text("\n".join([str(side), *packages]) + "\n")
    return home / "bin" / "python"


def start_side(folder: Path, side: str, plan: list[Step]) -> subprocess.Popen[bytes]:
    """Run all commands with one tree; what they write goes to ``folder/SIDE-out``, what they say to ``SIDE.log``."""
    out, words = folder / f"{side}-out", folder / f"{side}.json"
    out.mkdir()
    words.write_text(json.dumps(plan))
    one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "SPARSEMAE_ISA")
    } | one
    return subprocess.Popen(
        [python_of(folder / side), "-P", "-W", "ignore", __file__, "--side", words], cwd=out, env=environment,
        stdout=(folder / f"{side}.log").open("wb"), stderr=subprocess.STDOUT,
    )  # fmt: skip


KINDS_OF_FILES = {
    "checkpoints": "checkpoints/", "weights": "model.safetensors", "packed": "packed.safetensors", "logits": "logits",
    "masks": ".png", "numbers": "metrics.jsonl",
}  # fmt: skip
"""Columns of the table, and what in a file's name tells them: tensors, but pictures and numbers of the last two."""


class Different(Exception):
    """Says where."""


def compared(old: Path, new: Path) -> Counter[str]:
    """How much of each kind two folders of a command have in common. Raises `Different` at the first difference.

    Metrics that the new side alone has are additions.
    """
    counts: Counter[str] = Counter()
    for pattern, read in (("*.safetensors", tensors), ("[0-9][0-9].png", picture), ("metrics.jsonl", numbers)):
        files = [{str(file.relative_to(side)) for file in side.rglob(pattern)} for side in (old, new)]
        if files[0] != files[1]:
            raise Different(f"files of one side only: {', '.join(sorted(files[0] ^ files[1]))}")
        for name in sorted(files[0]):
            before, after = read(old / name), read(new / name)
            if before.keys() - after.keys() or (before.keys() != after.keys() and read is not numbers):
                raise Different(f"{name}: of one side only: {', '.join(sorted(before.keys() ^ after.keys())[:5])}")
            for key, value in before.items():
                if value != after[key]:
                    raise Different(f"{name}: {key}: {difference(value, after[key])}")
            counts["files"] += 1
            counts[next(kind for kind, part in KINDS_OF_FILES.items() if part in name)] += len(before)
    return counts


def tensors(file: Path) -> dict[str, Any]:
    """Type, shape and bytes of the tensors of a safetensors file; its metadata is left out."""
    content = file.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:size])
    return {
        name: (
            entry["dtype"],
            entry["shape"],
            content[size + entry["data_offsets"][0] : size + entry["data_offsets"][1]],
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def picture(file: Path) -> dict[str, Any]:
    """Values of a mask's pixels."""
    with Image.open(file) as image:
        return {"pixels": (image.mode, list(image.size), np.asarray(image).tobytes())}


def numbers(file: Path) -> dict[str, Any]:
    """Numbers of a run's metrics by line and name, but for times."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return {f"{i}.{name}": row[name] for i, row in enumerate(rows) for name in row if name not in UNCOMPARED}


def difference(old: Any, new: Any) -> str:
    """Two values that differ, in words."""
    types = {"F64": np.float64, "F32": np.float32}
    if not isinstance(old, tuple) or old[:2] != new[:2] or old[0] not in types:
        shown = [value[:2] if isinstance(value, tuple) else value for value in (old, new)]
        return f"{shown[0]} before, {shown[1]} now" + " (same type and shape)" * (shown[0] == shown[1])
    before, after = (np.frombuffer(value[2], types[value[0]]).astype(np.float64) for value in (old, new))
    return f"{(before != after).sum()} of {before.size} values differ, by up to {np.abs(before - after).max():.2e}"


def report(folder: Path, plan: list[Step]) -> bool:
    """Print a line per command: how many files, and how much of each kind in them; False at the first difference."""
    columns = ["files", *KINDS_OF_FILES]
    print(f"{'':<24}" + "".join(f"{column:>12}" for column in columns))
    total: Counter[str] = Counter()
    for step in plan:
        try:
            counts = compared(folder / "old-out" / step.name, folder / "new-out" / step.name)
            if not counts:
                raise Different("nothing to compare")
        except Different as error:
            print(f"{step.name:<24}DIFFERENT: {error}")
            return False
        print(f"{step.name:<24}" + "".join(f"{counts[column] or '':>12}" for column in columns))
        total += counts
    print(f"{'all equal, bit for bit':<24}" + "".join(f"{total[column]:>12,}" for column in columns))
    return True


def main() -> int:
    """Run both sides and compare; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", nargs="?", help="what the working tree is compared with")
    parser.add_argument("--new-options", default="", help="more options for the new side's training, to see it differ")
    parser.add_argument("--keep", action="store_true", help="leave the two trees, their files and logs where they are")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        run_side([Step(*step) for step in json.loads(Path(options.side).read_text())])
        return 0
    if options.commit is None:
        parser.error("wanted a commit")
    folder = Path(tempfile.mkdtemp(prefix="same-as-"))
    sides: dict[str, subprocess.Popen[bytes]] = {}
    try:
        make_trees(options.commit, folder)
        make_data(folder / "data")
        plan, more = steps(), shlex.split(options.new_options)
        changed = [Step(step.name, step.words + more * (step.words[0] in JOBS)) for step in plan]
        sides |= {"old": start_side(folder, "old", plan), "new": start_side(folder, "new", changed)}
        failed = [side for side, process in sides.items() if process.wait()]
        for side in failed:
            log = (folder / f"{side}.log").read_text(errors="replace").splitlines()
            print(f"the {side} side could not run:", *log[-30:], sep="\n")
        return 2 if failed else 1 - report(folder, plan)
    except subprocess.CalledProcessError as error:
        print(f"{shlex.join(map(str, error.cmd))}: {error.stderr or error}", file=sys.stderr)
        return 2
    finally:
        for process in sides.values():
            process.kill()  # one that has ended is left alone
        if options.keep:
            print(f"kept: {folder} (git worktree remove --force {folder / 'old'})")
        else:
            if (folder / "old").exists():
                git("worktree", "remove", "--force", str(folder / "old"))
            shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
