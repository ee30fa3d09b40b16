"""The bare install: numpy, pillow and safetensors alone; what it can do, and what it says of the rest."""

import json
import subprocess
import sys
import tarfile
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from conftest import ROOT, SAID
from torchmetrics.classification import MulticlassAccuracy, MulticlassPrecision, MulticlassRecall

from sparsemae.commands.evaluate import evaluate
from sparsemae.commands.evaluate_run import evaluate_run
from sparsemae.config import _positional
from sparsemae.options import EvaluateConfig, PredictConfig, SourceConfig
from sparsemae.packing.format import PackedModel, read, write
from sparsemae.plain_parser import PlainParser
from sparsemae.recipe_parser import recipe_parser
from sparsemae.tasks.class_figures import details, figures, summary

# No module is found that is neither Python's nor of the three packages; then command lines are run.
DRIVER = f"""
import sys
class Only:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        there = name.split(".")[0] in set(sys.stdlib_module_names) | set("numpy PIL safetensors sparsemae".split())
        return self.finder.find_spec(name, path, target) if there else None
sys.meta_path[:] = map(Only, sys.meta_path)
{SAID}
for words in json.loads(sys.argv[1]):
    print(json.dumps(said(words)))
"""


def bare(lines: list[list[str]]) -> list[tuple[int, str, str]]:
    """Status, output and errors of command lines in one process that has the three packages alone."""
    done = subprocess.run([sys.executable, "-c", DRIVER, json.dumps(lines)], capture_output=True, text=True, check=True)
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = reference.random_model(reference.vit_shape(num_classes=2), dtype="fp32")
    card = replace(model.config.card, class_names=("cat", "dog"))
    path = tmp_path_factory.mktemp("bare") / "small.safetensors"
    write(path, PackedModel(replace(model.config, card=card), model.tensors))
    return path


@pytest.mark.slow
@pytest.mark.holds("take.6")
def test_predict_and_evaluate_with_three_packages_alone(packed: Path, image_folder: Path, tmp_path: Path) -> None:
    """From a folder, a table and tars, and as torch does."""
    model = str(packed)
    for split in ("train", "val"):
        rows = [f"{file},{file.parent.name}" for file in sorted((image_folder / split).glob("*/*.png"))]
        (tmp_path / "tables").mkdir(exist_ok=True)
        (tmp_path / f"tables/{split}.csv").write_text("\n".join(["image,label", *rows]))
        (tmp_path / "tars").mkdir(exist_ok=True)
        with tarfile.open(tmp_path / f"tars/{split}.tar", "w") as archive:
            archive.add(image_folder / split, split)
    sources = [str(image_folder), str(tmp_path / "tables"), str(tmp_path / "tars")]
    predicted, table, *evaluated, page = bare([
        ["predict", model, str(image_folder / "val"), "--top-k", "2"],
        ["predict", model, str(image_folder / "val"), "--format", "csv"],
        *(["evaluate", model, root] for root in sources),
        ["evaluate", model, f"--data={{source: folder, root: {sources[0]}}}"], ["evaluate", "--help"],
    ])  # fmt: skip
    assert (predicted[0], predicted[2], table[0]) == (0, "", 0)
    assert table[1].count("\n") == 1 + 2 * len(predicted[1].splitlines())
    assert page[1].startswith("usage: sparsemae evaluate MODEL [DATA]")
    wanted = evaluate_run(EvaluateConfig(model, SourceConfig(root=str(image_folder))))
    for status, out, error in evaluated:
        assert status == 0, error
        assert out.splitlines()[-1].endswith(f"{summary(wanted)} on {len(predicted[1].splitlines())} images")
        assert [line.split()[0] for line in out.splitlines()[:-1]] == ["recall", "cat", "dog"]
    assert evaluate(EvaluateConfig(model, SourceConfig(root=sources[0]))).items() >= wanted.items()


@pytest.mark.slow
@pytest.mark.holds("take.6")
def test_what_wants_more_says_so_in_one_line(packed: Path, image_folder: Path, runs: Path, tmp_path: Path) -> None:
    root, run = str(image_folder), str(runs / "finetune")
    lines = [
        ["finetune", root], ["pack", run, "x"], ["export", run, "x"], ["check", root], ["report", run],
        ["predict", run, root], ["evaluate", run], ["evaluate", str(packed), root, "--data.source", "hfds"],
        ["evaluate", str(packed), root, "--config", "finetune_t"], ["finetune", "--help"], ["pretrain"],
    ]  # fmt: skip
    for words, (status, out, error) in zip(lines, bare(lines), strict=True):
        assert (status, out, error.count("\n")) == (2, "", 1), (words, error)
        assert error.endswith("pip install 'sparsemae[train]'\n"), error
    write(tmp_path / "encoder", reference.random_model(reference.vit_shape(num_classes=0)))
    write(tmp_path / "unnamed", reference.random_model(reference.vit_shape(num_classes=2)))
    found, *others = bare([
        ["evaluate", str(packed), "--data.source", "embedded"], ["evaluate", str(tmp_path / "encoder"), root],
        ["evaluate", str(tmp_path / "unnamed"), root],
    ])  # fmt: skip
    for (status, _, error), got in zip(others, ("an encoder", "one without"), strict=True):
        assert status == 2
        assert error.endswith(f"wanted a classifier with the names of its classes, got {got}\n")
    assert found[2].count("\n") == 1
    assert "sparsemae-images, got none: pip install ./images in a checkout" in found[2]


def test_the_bare_install_depends_on_three_packages() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert [one.partition(">")[0] for one in project["dependencies"]] == ["numpy", "pillow", "safetensors"]


@pytest.mark.holds("take.6")
@pytest.mark.parametrize("classes", [2, 7, 40])
def test_figures_are_torchmetrics(classes: int) -> None:
    generator = np.random.default_rng(classes)
    targets = generator.integers(0, classes - 1, 500)  # one class has no image
    logits = generator.standard_normal((500, classes), np.float32) + 2 * np.eye(classes, dtype=np.float32)[targets]
    logits[:, 0] = -9  # and one is never predicted
    found = figures(targets, np.argsort(-logits, axis=1, kind="stable")[:, :5], [f"c{i}" for i in range(classes)])
    given = torch.from_numpy(logits), torch.from_numpy(targets)
    for name, k in (("top1", 1), ("top5", min(5, classes))):
        assert found[name] == pytest.approx(float(MulticlassAccuracy(classes, k, "micro")(*given)))
    nan = np.full(classes, np.nan)
    for kind, meter in (("recall", MulticlassRecall), ("precision", MulticlassPrecision)):
        wanted = meter(classes, average="none")(*given).numpy()
        there = np.bincount(targets if kind == "recall" else logits.argmax(1), minlength=classes) > 0
        got = [found[f"{kind}/{i}"] for i in range(classes)]
        np.testing.assert_allclose(got, np.where(there, wanted, nan), rtol=1e-6)
    shown = details([f"c{i}" for i in range(classes)], found)
    assert len(shown) == classes + 1
    assert shown[-1].split()[1] == "none"


def test_two_classes_of_one_name_have_their_own_figures() -> None:
    """As ImageNet's crane, the bird and the machine."""
    best = np.array([[0, 1, 2], [2, 1, 0], [2, 1, 0], [1, 0, 2]])
    found = figures(np.array([0, 0, 1, 2]), best, ["crane", "owl", "crane"])
    assert details(["crane", "owl", "crane"], found) == [
        "           recall precision",
        "  crane    50.00%   100.00%",
        "  owl       0.00%     0.00%",
        "  crane     0.00%     0.00%",
    ]
    assert [found[f"recall/{i}"] for i in range(3)] == [0.5, 0, 0]


@pytest.mark.parametrize("command", [evaluate, evaluate_run], ids=["numpy", "torch"])
def test_logits_that_are_not_finite_are_no_class(
    packed: Path, image_folder: Path, tmp_path: Path, command: Any
) -> None:
    model, file = read(packed), tmp_path / "broken.safetensors"
    model.tensors["head.weight"][:] = 3e38
    write(file, model)
    with pytest.raises(ValueError, match=rf"^{file}: wanted finite logits, got NaN or infinite ones$"):
        command(EvaluateConfig(str(file), SourceConfig(root=str(image_folder))))


WORDS: dict[Any, list[list[str]]] = {
    PredictConfig: [
        ["model", "a.jpg", "b.jpg"],
        ["model", "a.jpg", "--top_k=7", "--format=jsonl", "--null=true", "--out=null", "--pictures=null"],
        ["model", "a.jpg", "--format=xml"], ["model", "a.jpg", "--top_k=x"], ["model", "a.jpg", "--null=maybe"],
        ["model", "a.jpg", "--top_k=0"], ["model"], ["model", "a.jpg", "--formats=csv"],
    ],
    EvaluateConfig: [
        ["model"],
        ["model", "--data.source=auto", "--data.root=images", "--data.background=[0, 1, 2]", "--data.exif=false"],
        ["model", "--inference={mode: whole, scales: [0.75, 1.25], flip: true}", "--split=all"],
        ["model", "--data={source: csv, root: x, val_share: 0.25, image_column: a b}", "--data.workers=0"],
        ["model", "--data={source: folder"],
        ["model", "--data.background=[0, 1]"], ["model", "--data.background=[0, 1, x]"], ["model", "--data.bits=null"],
        ["model", "--data.val_share=2"],
        ["model", "--probe=svm"], ["model", "--data.workers=1.5"], ["model", "--data.source=zip"],
    ],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "words"), [(kind, words) for kind, lines in WORDS.items() for words in lines])
def test_words_are_read_as_jsonargparse_reads_them(kind: Any, words: list[str]) -> None:
    results = []
    for parser in (PlainParser(kind, "test", _positional(kind)), recipe_parser(kind, "test", _positional(kind))):
        try:
            if isinstance(parser, PlainParser):
                results.append(parser.made(words))
            else:
                parsed: Any = parser.instantiate(parser.parse_args(words))
                results.append(kind(**{name: getattr(parsed, name) for name in vars(kind(*["x"] * 2))}))
        except ValueError:
            results.append("refused")
    assert results[0] == results[1]
