"""The benchmark runs with what is installed, says what is missing, and writes what it measured."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import photographs
import pytest
import reference
import torch

from sparsemae.benchmark import packed, saving, training
from sparsemae.benchmark.command import benchmark
from sparsemae.benchmark.packed import DENSE, Measurement, table
from sparsemae.benchmark.timing import aligned, take_turns
from sparsemae.benchmark.training import Subject
from sparsemae.models import build_vit
from sparsemae.options import BenchmarkConfig, OptimConfig, SparseConfig
from sparsemae.packing.format import write
from sparsemae.tasks.sparse import make_sparse
from sparsemae.training.optim import make_optimizer

SHAPE = {"patch_size": 16, "image_height": 64, "image_width": 64, "depth": 1}


@pytest.mark.slow
def test_packed_file_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "small.safetensors", reference.random_model(reference.vit_shape(**SHAPE)))
    config = BenchmarkConfig(
        files=[str(tmp_path / "small.safetensors"), str(tmp_path / "absent.safetensors")], engines=[], batches=[1, 3],
        threads=1, runs=2, json=str(tmp_path / "out.json"),
    )  # fmt: skip
    measured, absent = benchmark(config)
    assert set(measured.milliseconds) == {1, 3}
    assert min(measured.milliseconds.values()) > 0
    assert measured.resident_mb < 120
    assert 0 < measured.cold_start_seconds < 30
    assert "No such file" in absent.error
    assert json.loads((tmp_path / "out.json").read_text())["results"][0]["model"] == "small"
    assert "small" in capsys.readouterr().out


def test_table_names_what_is_missing() -> None:
    rows = [
        Measurement("openvino bf16", "B", error="No module named 'openvino'"),
        Measurement("packed", "T", {1: 5.0}, 0.3, 80.0),
    ]
    head, figures, missing = table(rows).splitlines()
    assert head.split() == ["engine", "model", "b1", "ms", "images/s", "cold", "s", "RSS", "MB"]
    assert figures.split() == ["packed", "T", "5.00", "200.0", "0.30", "80"]
    assert missing == "openvino bf16, B -- No module named 'openvino'"


def test_what_was_measured_is_kept_when_it_is_stopped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the fourth question; each answer is shown as it comes."""
    answers = iter((0.002, 0.003, 0.016))

    class Worker:
        def __init__(self, stack: object, module: str, engine: str, model: str, *rest: object) -> None:
            self.row = Measurement(engine, model)

        def ask(self, question: str) -> list[float]:
            try:
                return [next(answers)]
            except StopIteration:
                raise KeyboardInterrupt from None

    monkeypatch.setattr(packed, "_Worker", Worker)
    monkeypatch.setattr(packed, "_PAUSE_SECONDS", 0)
    benchmark(BenchmarkConfig(files=["a", "b"], engines=[], batches=[1, 8], runs=1))
    shown = capsys.readouterr()
    assert [line.split()[:4] for line in shown.out.splitlines()[1:]] == [
        ["packed", "a", "2.00", "16.00"], ["packed", "b", "3.00", "-"],
    ]  # fmt: skip
    assert shown.err.splitlines()[-1] == "batch 8, run 1 of 1: packed, a: 16.00 ms"


def test_sections_of_training_keep_what_they_have(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Stopped after a part, or after a recipe: the table and the file have what was measured."""

    def stopped(*_: object) -> Any:
        raise KeyboardInterrupt

    photographs.class_folders(tmp_path / "images" / "train", 2 * training.LOADER_BATCH)
    monkeypatch.setattr(training, "_pipelines", lambda *_: [training.Rate("input pipeline", "timm", 300.0)])
    monkeypatch.setattr(training, "_stages", stopped)
    answers = iter([saving.Saving("pretrain_t", 1.0, 2.0, 0.5, 0.1, 0.0, 1.0)])
    monkeypatch.setattr(saving, "subject", lambda *_: None)
    monkeypatch.setattr(saving, "_measure", lambda *_: next(answers, None) or stopped())
    kept_by: dict[Any, str] = {"training": "timm", "saving": "pretrain_t"}
    for section, kept in kept_by.items():
        file = tmp_path / f"{section}.json"
        benchmark(BenchmarkConfig(section=section, images=str(tmp_path / "images"), json=str(file)))
        assert [row["subject"] for row in json.loads(file.read_text())["results"]] == [kept]
        assert kept in capsys.readouterr().out


def test_subjects_take_turns_and_the_first_turn_does_not_count() -> None:
    order: list[str] = []

    def figure(name: str) -> float:
        order.append(name)
        return float(len(order))

    medians = take_turns({name: partial(figure, name) for name in "ab"}, runs=2)
    assert "".join(order) == "abbaab"
    assert medians == {"a": (4 + 5) / 2, "b": (3 + 6) / 2}


def test_columns_are_aligned() -> None:
    assert aligned([["name", "s"], ["a", "10.5"]], texts=1).splitlines() == ["name     s", "a     10.5"]


def test_saving_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def small(recipe: str, batch: int, pattern: str) -> Subject:
        model = build_vit("vit_base_patch16_224", {"embed_dim": 32, "depth": 1, "num_heads": 2}, 224, 2)
        make_sparse(model, SparseConfig(pattern=pattern))
        optimizer = make_optimizer(model, OptimConfig())

        def step() -> None:
            model(torch.zeros(batch, 3, 224, 224)).sum().backward()
            optimizer.step()

        return Subject(model, optimizer, step)

    monkeypatch.setattr(saving, "subject", small)
    monkeypatch.setattr(saving, "RECIPES", ("small",))
    config = BenchmarkConfig(section="saving", step_batch=1, threads=1, runs=1, artifacts=str(tmp_path),
                             json=str(tmp_path / "out.json"))  # fmt: skip
    (row,) = benchmark(config)
    parameters = sum(parameter.numel() for parameter in small("", 1, "2:32").model.parameters())
    assert 12 * parameters < 1e9 * row.gigabytes < 13 * parameters + 20_000
    assert min(row.blocking_seconds, row.first_seconds, row.held_seconds, row.step_seconds) > 0
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    assert json.loads((tmp_path / "out.json").read_text())["results"][0]["subject"] == "small"
    assert saving.table([row]).splitlines()[1].startswith("small ")


@pytest.mark.holds_only
@pytest.mark.holds("survive.2")
def test_what_the_loop_is_held_up_by_a_save(figure: Any, benchmark_line: Any) -> None:
    """Saving ViT-B with AdamW's state: what the loop is held up by, of the time of a blocking save."""
    for row in benchmark(BenchmarkConfig(section="saving", step_batch=1, runs=3)):
        figure(
            f"{row.subject}, {row.gigabytes:.2f} GB: {row.held_seconds:.2f} s of {row.blocking_seconds:.2f} s, "
            f"{row.held_fraction:.0%}"
        )
        benchmark_line(f"{row.subject}: held up, of a blocking save", row.held_fraction, 0.25)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Measurement]:
    """Everything that the issue's bars compare, in one interleaved run."""
    folder = tmp_path_factory.mktemp("benchmark")
    rows = benchmark(BenchmarkConfig(dense=["B", "S"], batches=[1, 8], artifacts=str(folder)))
    return {(row.engine, row.model): row for row in rows if not row.error}


@pytest.mark.holds_only
@pytest.mark.holds("imagenet.6", "fast.8")
def test_the_input_pipeline_beside_timms(tmp_path: Path, figure: Any, benchmark_line: Any) -> None:
    photographs.make(tmp_path)
    config = BenchmarkConfig(section="training", images=str(tmp_path / "folder"))
    rates = {(rate.part, rate.subject): rate for rate in benchmark(config)}
    for (part, subject), rate in rates.items():
        figure(f"{part}: {subject}: {rate.images_per_second:.1f} images/s")
    own, fast = (rate.ratio for (part, _), rate in rates.items() if part == "input pipeline" and rate.ratio is not None)
    benchmark_line("input pipeline, times timm's", own, 1, higher_is_better=True)
    benchmark_line("input pipeline by torchvision, times timm's", fast, 1.9, higher_is_better=True)


ANY = "any engine"
BARS = [  # packed model, batch, rival, dense model, at least so many times as fast
    ("SparseMAE-T bf16", 1, "torch fp32", "B", 28), ("SparseMAE-T bf16", 1, "torch bf16", "B", 8),
    ("SparseMAE-T bf16", 1, ANY, "B", 4.2), ("SparseMAE-T bf16", 1, "openvino bf16", "S", 2),
    ("SparseMAE-T bf16", 8, "torch fp32", "B", 24), ("SparseMAE-T bf16", 8, "torch bf16", "B", 8),
    ("SparseMAE-T bf16", 8, ANY, "B", 3.3), ("SparseMAE-S bf16", 1, "torch fp32", "B", 18),
    ("SparseMAE-S bf16", 1, "torch bf16", "B", 5), ("SparseMAE-S bf16", 1, ANY, "B", 2.6),
]  # fmt: skip


@pytest.mark.holds_only
@pytest.mark.holds("packed.4")
@pytest.mark.parametrize(("model", "batch", "rival", "size", "wanted"), BARS)
def test_beside_dense(
    measured: dict[tuple[str, str], Measurement],
    benchmark_line: Any,
    model: str,
    batch: int,
    rival: str,
    size: str,
    wanted: float,
) -> None:
    dense = {engine: row.milliseconds[batch] for (engine, name), row in measured.items() if name == DENSE[size]}
    against = min(dense, key=dense.__getitem__) if rival == ANY else rival
    ratio = dense[against] / measured["packed", model].milliseconds[batch]
    name = f"{model} at batch {batch}, times as fast as dense {size} in {against}"
    benchmark_line(name, ratio, wanted, higher_is_better=True)


@pytest.mark.holds_only
@pytest.mark.holds("packed.5")
def test_avx2_beside_dense_in_torch(monkeypatch: pytest.MonkeyPatch, benchmark_line: Any) -> None:
    monkeypatch.setenv("SPARSEMAE_ISA", "avx2")
    ours, *_, dense = benchmark(BenchmarkConfig(engines=["torch fp32"], dense=["B"], batches=[1]))
    ratio = dense.milliseconds[1] / ours.milliseconds[1]
    name = f"{ours.model} forced to AVX2, {ours.milliseconds[1]:.1f} ms, times as fast as torch fp32 at its best"
    benchmark_line(name, ratio, 5, higher_is_better=True)
