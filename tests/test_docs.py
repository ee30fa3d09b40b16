"""The commands that the documents show are run, but for the size of models and data; what they name exists."""

import asyncio
import json
import re
import shlex
import subprocess
from dataclasses import fields, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
from conftest import ROOT, scene_folder
from documents import PAGES, blocks, commands, promised
from photographs import class_folders
from PIL import Image
from safetensors.torch import save_file

import sparsemae
from sparsemae.cli import main
from sparsemae.config import SHORT as SHORT_NAMES, read_config, recipe_names
from sparsemae.jobs import JOBS, resolve

DOCUMENTS = (*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "native/README.md")
SHORT = [
    "--trainer.max_steps", "2", "--trainer.global_batch", "8", "--trainer.precision", "fp32", "--trainer.devices", "1",
    "--trainer.accelerator", "cpu", "--data.workers", "0", "--init", "null",
]  # fmt: skip
SMALL = {
    "": ["--model.args", "{patch_size: 7, embed_dim: 32, depth: 4, num_heads: 2}"],  # the demo's recipes
    "pretrain_t": ["--model.args", "{patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}", "--data.img_size", "32",
                   "--decoder", "{embed_dim: 16, depth: 1, num_heads: 2}"],
    "segment_t": ["--model.args", "{embed_dim: 32, depth: 4, num_heads: 2}", "--out_indices", "[0, 1, 2, 3]",
                  "--head", "{width: 16, auxiliary_width: 8}", "--data.img_size", "64", "--data.short_side", "64",
                  "--inference.stride", "48"],
}  # fmt: skip
"""By recipe."""
OWN = 7
"""Commands of docs/own-images.md that are run as they are."""


def words_of(page: str) -> list[list[str]]:
    return commands(ROOT / page)


def shortened(words: list[str]) -> list[str]:
    """A command as the page has it, and what makes a training one of two small steps."""
    if words[0] not in ("pretrain", "finetune", "segment"):
        return words
    recipe = words[words.index("--config") + 1] if "--config" in words else ""
    init = [] if "--init" not in words else ["--init", words[words.index("--init") + 1]]
    return [*words, *SHORT, *SMALL[recipe], *init]


@pytest.fixture
def workplace(tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with everything that the commands name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "imagenet").symlink_to(image_folder)
    (tmp_path / "folder").mkdir()
    for name in ("photo.jpg", "folder/1.jpg", "folder/2.png"):
        Image.new("RGB", (80, 60), "red").save(tmp_path / name)
    return tmp_path


@pytest.mark.slow
@pytest.mark.holds("house.7")
def test_the_readmes_commands_run(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scene_folder(workplace / "ADEChallengeData2016", 8, 2, longest=120)
    chain = [words for program, *words in words_of("README.md") if program == "sparsemae"]
    assert {words[0] for words in chain} == JOBS.keys() - {"demo", "benchmark", "study", "web"}
    for words in chain:
        main(shortened(words))
    shown = capsys.readouterr().out
    assert len(re.findall(r"^(?:photo\.jpg|folder/[12]\.\w+): .+%, .+%, .+%$", shown, re.MULTILINE)) >= 3
    assert "mIoU" in shown
    for file in ("runs/mae/report.html", "exclude.txt", "small.safetensors", "masks/photo-overlay.png"):
        assert (workplace / file).is_file(), file


@pytest.mark.slow
@pytest.mark.holds("imagenet.7", "house.7")
def test_from_a_timm_vit_and_a_folder_to_predictions_in_four_commands(
    workplace: Path, capsys: pytest.CaptureFixture[str], figure: Any
) -> None:
    """As written, but for the size of the model, weights that need no download, and three steps of four images."""
    source = timm.create_model("deit_tiny_patch16_224", pretrained=False)
    save_file(source.state_dict(), workplace / "deit.safetensors")
    shorter = ["--model.name", "deit_tiny_patch16_224", "--trainer.global_batch", "4", "--trainer.max_steps", "3",
               "--trainer.precision", "fp32", "--data.workers", "0"]  # fmt: skip
    chain = words_of("docs/own-images.md")[OWN:][:4]
    assert [words[1] for words in chain] == ["check", "finetune", "pack", "predict"]
    for _, *words in chain:
        here = ["deit.safetensors" if word.startswith("timm:") else word for word in words]
        main(here + shorter if here[0] == "finetune" else here)
    shown = capsys.readouterr().out
    predicted = re.findall(r"images/val/(\w+)/\d\.png: (\w+) [\d.]+%, (\w+) [\d.]+%", shown)
    assert len(predicted) == 6
    assert all({first, second} == {"cat", "dog"} for _, first, second in predicted)
    figure(f"{len(chain)} commands, {len(predicted)} predictions")


@pytest.mark.holds("own.7")
@pytest.mark.holds_only
def test_a_folder_in_the_pages_own_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], figure: Any
) -> None:
    """As written, on 400 photographs."""
    monkeypatch.chdir(tmp_path)
    class_folders(tmp_path / "images", 400)
    chain = words_of("docs/own-images.md")[:OWN]
    assert [words[1] for words in chain] == [
        "check", "finetune", "evaluate", "pack", "predict", "pretrain", "finetune",
    ]  # fmt: skip
    for _, *words in chain:
        main(words)
    shown = capsys.readouterr()
    predicted = re.findall(r"^images/(\w+)/\d+\.jpg: (\w+) [\d.]+%", shown.out, re.MULTILINE)
    assert len(predicted) == 400
    right = sum(name == first for name, first in predicted)
    figure(f"{right} of 400 images right, packed; {shown.err.split('k-NN vote', 1)[1].splitlines()[0]}")
    assert right > 380


@pytest.mark.slow
@pytest.mark.holds("house.7")
def test_images_with_masks_in_four_commands(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = timm.create_model("vit_base_patch16_224", embed_dim=32, depth=4, num_heads=2)
    save_file(model.state_dict(), workplace / "vit.safetensors")
    (workplace / "classes.txt").write_text("left\nright\n")
    generator, mask = np.random.default_rng(0), np.zeros((60, 80), np.uint8)
    mask[:, 40:] = 1
    for split, count in (("train", 8), ("val", 2)):
        for kind in ("images", "masks"):
            (workplace / "scenes" / kind / split).mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(0, 256, (60, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(workplace / f"scenes/images/{split}/{i}.jpg")
            Image.fromarray(mask).save(workplace / f"scenes/masks/{split}/{i}.png")
    chain = words_of("docs/own-images.md")[OWN + 4 :]
    assert [words[1] for words in chain] == ["check", "segment", "evaluate", "predict"]
    for _, *words in chain:
        main(shortened(["vit.safetensors" if word.startswith("timm:") else word for word in words]))
    shown = capsys.readouterr().out
    assert "checked as for --task segment" in shown
    assert "on 2 images" in shown
    assert (workplace / "masks/1-overlay.png").is_file()


@pytest.mark.slow
@pytest.mark.holds("house.7")
def test_one_machine_starts_its_own_processes(workplace: Path) -> None:
    """The launchers of several machines are run, with two processes, by tests/training/test_launch.py."""
    (words,) = [words for program, *words in words_of("docs/scale-out.md") if program == "sparsemae"]
    main(shortened(words))
    assert (workplace / "runs/pretrain_t/model.safetensors").is_file()


def test_the_commands_for_several_machines_are_understood() -> None:
    chain = [words for words in words_of("docs/scale-out.md") if "sparsemae" in " ".join(words)]
    for words in chain:
        at = next(i for i, word in enumerate(words) if word in ("sparsemae", "sparsemae.cli"))
        config: Any = read_config(resolve(JOBS[words[at + 1]].options), words[at + 2 :])
        nodes = words[words.index("--nnodes") + 1] if "--nnodes" in words else str(config.trainer.num_nodes)
        assert int(nodes) == config.trainer.num_nodes
    assert len(chain) == 3


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_shell_is_shell_and_make_has_its_targets(page: Path) -> None:
    for block in blocks(page, "sh"):
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = [words[1] for words in commands(page) if words[0] == "make"]
    named += re.findall(r"`make ([\w-]+)[^`]*`", page.read_text())
    assert set(named) <= targets
    others = {words[0] for words in commands(page)} - {
        "make",
        "sparsemae",
        "torchrun",
        "srun",
        "[",
        "cmake",
        "build/c/sparsemae-run",
    }
    assert not others, "a test runs these?"


def option_names(kind: Any, prefix: str = "") -> set[str]:
    """Dotted names of a dataclass's fields, those of nested dataclasses included."""
    names = set()
    for field in fields(kind):
        names.add(prefix + field.name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        if is_dataclass(default):
            names |= option_names(default, f"{prefix}{field.name}.")
    return names


def test_options_and_commands_in_the_text_exist() -> None:
    kinds = {name: resolve(job.options) for name, job in JOBS.items()}
    options: set[str] = {name for kind in kinds.values() for name in option_names(kind)}
    options |= {
        "config",
        "print_config",
        "debug",
        "help",
        "help_all",
        "version",
        "completion",
        "data.root",
        *SHORT_NAMES,
    }
    groups = {name.split(".")[0] for name in options if "." in name}
    slurms = {"kill_on_bad_exit", "ntasks", "ntasks_per_node", "signal"}
    foreign = {"holds", "index_url"} | slurms  # of pytest and pip the first two
    for page in DOCUMENTS:
        for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", page.read_text()):
            if code.startswith(("pytest", "torchrun", ".venv", "python")):
                continue
            named = {name.replace("-", "_") for name in re.findall(r"(?<!\S)--([a-z][\w.-]*)", code)}
            named |= {name for name in re.findall(r"^([a-z]+\.[a-z_]+)(?: [\w.-]+)?$", code)
                      if name.split(".")[0] in groups and not name.endswith((".json", ".py"))}  # fmt: skip
            named -= {f"{group}." for group in groups}  # --data.*
            assert named <= options | foreign, f"{page.name}: {code}"
            if match := re.match(r"sparsemae ([a-z]+)", code):
                assert match[1] in JOBS, f"{page.name}: {code}"


def test_commands_in_the_text_are_understood() -> None:
    seen = 0
    for page in DOCUMENTS:
        for code in re.findall(r"(?<!`)`sparsemae ([^`\n]+)`(?!`)", page.read_text()):
            name, *words = shlex.split(code)
            if words and not re.search(r"[A-Z]{3}|\.\.\.|\|", code) and not set(words) & {"--help", "--print_config"}:
                read_config(resolve(JOBS[name].options), words)
                seen += 1
    assert seen >= 5


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        file, _, anchor = target.partition("#")
        if "://" in file:
            continue
        there = page.parent / file if file else page
        assert there.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in slugs, target


def test_every_page_is_linked_from_the_readme_and_every_recipe_named() -> None:
    text = (ROOT / "README.md").read_text()
    assert all(f"](docs/{page.name})" in text for page in PAGES if page.parent.name == "docs")
    named = {re.sub("_[ts](?=_|$)", "", name) for name in re.findall(r"`(\w+)`", text)}
    assert {
        re.sub("_[ts](?=_|$)", "", name) for name in recipe_names() if not name.startswith(("demo", "study"))
    } <= named
    assert text.count("\n") < 110, "one screen, then links"


def test_the_results_in_the_readme_are_those_of_the_page() -> None:
    tables = [
        re.search(r"<!-- table of make results -->\n(.*?)<!-- end -->", (ROOT / file).read_text(), re.DOTALL)
        for file in ("README.md", "docs/results.md")
    ]
    found = [table[1] for table in tables if table is not None]
    assert len(found) == 2
    assert "SparseMAE" in found[0]
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.holds("house.7")
def test_a_model_goes_elsewhere_as_the_page_says(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The C program of the page is run by tests/native/test_c.py."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("starlette")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/mine").symlink_to(runs / "finetune")
    (tmp_path / "photos").mkdir()
    for i in range(3):
        Image.new("RGB", (80, 60), (80 * i, 0, 0)).save(tmp_path / f"photos/{i}.jpg")
    main(["pack", "runs/mine", "small.safetensors"])
    chain = [words for program, *words in words_of("docs/deploy.md") if program == "sparsemae"]
    assert [words[0] for words in chain] == ["predict", "export", "export", "web"]
    for words in chain[:-1]:  # the page wants `make wasm`: tests/commands/test_web.py
        main(words)
    assert (tmp_path / "classes.csv").read_text().count("\n") == 1 + 3 * 3
    app: Any = None
    for block in blocks(ROOT / "docs/deploy.md", "python"):
        if "openvino" in block and find_spec("openvino") is None:  # of the extra `bench`
            continue
        capsys.readouterr()
        names: dict[str, Any] = {}
        exec(compile(block, "docs/deploy.md", "exec"), names)
        assert capsys.readouterr().out.splitlines() == promised(block)
        app = names.get("app", app)
    photograph, (best, *_) = (
        (tmp_path / "photos/1.jpg").read_bytes(),
        sparsemae.load("small.safetensors").predict("photos/1.jpg", 3)[0],
    )
    found = [asyncio.run(answer(app, body)) for body in (photograph, b"no image")]
    assert [status for status, _ in found] == [200, 400]
    assert found[0][1][0] == {"label": best.label, "probability": best.probability}
    assert found[1][1] == {"error": "image 0: unreadable image: not an image in a known format"}


async def answer(app: Any, body: bytes) -> tuple[int, Any]:
    """Status and JSON of a POST, as a server would hand it to an ASGI application."""
    scope = {"type": "http", "method": "POST", "path": "/classify", "query_string": b"", "headers": []}
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent))
