"""Files that the package wrote before it was restructured: they load, give what they gave, and their runs go on.

tests/fixtures/before/README.md says what the files are and how they were made. Only the command line and the runtime
are used, so that the test does not move with the code.
"""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import metrics
from PIL import Image
from safetensors.numpy import load_file

from sparsemae.cli import main
from sparsemae.runtime import load

BEFORE = Path(__file__).parent / "fixtures" / "before"
SAID: dict[str, list[str]] = json.loads((BEFORE / "expected" / "said.json").read_text())
LOSS = 1e-6
"""Tolerance of numbers in metrics.jsonl: losses and scores are computed in fp32 even where the weights are fp64."""

pytestmark = [
    pytest.mark.holds("house.2"),
    pytest.mark.filterwarnings("ignore:the portable kernels are slow"),
]


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As the files were made: in their folder, on one thread, by the portable kernels."""
    threads = torch.get_num_threads()
    monkeypatch.chdir(BEFORE)
    monkeypatch.setenv("SPARSEMAE_ISA", "portable")
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fp64_evaluation() -> Iterator[None]:
    """Cast images to the first layer's type: the old code evaluated fp64 models on fp32 images, which torch refuses."""

    def cast(module: torch.nn.Module, inputs: tuple[Any, ...]) -> Any:
        double = isinstance(module, torch.nn.Conv2d) and module.weight.dtype == torch.float64
        return (inputs[0].double(),) if double else None

    handle = torch.nn.modules.module.register_module_forward_pre_hook(cast)
    yield
    handle.remove()


def largest_difference(one: Path, other: Path) -> float:
    """Over all tensors of two weights files, which must have the same names, types and shapes."""
    a, b = load_file(one), load_file(other)
    assert {name: (t.dtype, t.shape) for name, t in a.items()} == {name: (t.dtype, t.shape) for name, t in b.items()}
    return max(float(np.abs(a[name].astype(np.float64) - b[name].astype(np.float64)).max()) for name in a)


def rankings(lines: list[str]) -> list[tuple[str, list[str], list[float]]]:
    """Printed lines of `predict` as (file, class names, percentages)."""
    rows = [line.split(": ", 1) for line in lines]
    found = [(file, re.findall(r"([^,%]+?) ([\d.]+)%(?:, )?", text)) for file, text in rows]
    return [(file, [name for name, _ in pairs], [float(share) for _, share in pairs]) for file, pairs in found]


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="torch's fp32 exponential, in the losses, rounds otherwise without AVX2",
)
@pytest.mark.parametrize("job", ["pretrain", "finetune", "segment"])
@pytest.mark.usefixtures("fp64_evaluation")
@pytest.mark.slow
def test_a_run_stopped_in_mid_epoch_goes_on_to_the_old_weights(tmp_path: Path, job: str, figure: Any) -> None:
    run = tmp_path / job
    shutil.copytree(BEFORE / "runs" / job, run, symlinks=True)
    main([job, "--config", f"runs/{job}/config.yaml", "--out", str(run)])
    difference = largest_difference(run / "model.safetensors", BEFORE / "finals" / f"{job}.safetensors")
    figure(f"{job}: final weights differ by {difference:.1e}")
    assert difference <= 1e-9
    wanted = [json.loads(line) for line in (BEFORE / "finals" / f"{job}.jsonl").read_text().splitlines()]
    rows = metrics(run)
    assert [row["step"] for row in rows] == [row["step"] for row in wanted]
    for row, old in zip(rows, wanted, strict=True):
        numbers = old.keys() - {"images_per_second"}
        assert {name: row[name] for name in numbers} == pytest.approx({name: old[name] for name in numbers}, abs=LOSS)


@pytest.mark.parametrize("model", [model for model in SAID if not model.startswith("finals")])
def test_predict_says_what_it_said(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["predict", model, "images", *(["--pictures", str(tmp_path)] if "segment" in model else [])])
    now, then = rankings(capsys.readouterr().out.splitlines()), rankings(SAID[model])
    assert [(file, names) for file, names, _ in now] == [(file, names) for file, names, _ in then]
    for (_, _, shares), (_, _, old) in zip(now, then, strict=True):
        assert shares == pytest.approx(old, abs=0.11)  # printed to a tenth of a percent
    if "segment" in model:
        for i in range(4):
            with Image.open(tmp_path / f"{i}.png") as mask, Image.open(BEFORE / f"expected/mask-{i}.png") as wanted:
                assert mask.getpalette() == wanted.getpalette()
                assert (np.asarray(mask) == np.asarray(wanted)).mean() > 0.99


def test_evaluate_says_what_it_said(capsys: pytest.CaptureFixture[str]) -> None:
    model = "finals/finetune.safetensors"
    main(["evaluate", model, "--data.source", "tar", "--data.root", "data/images", "--data.workers", "0"])
    assert capsys.readouterr().out.splitlines() == SAID[model]


@pytest.mark.parametrize("dtype", ["bf16", "int8", "fp32"])
def test_a_packed_file_gives_its_logits_bit_for_bit(dtype: str) -> None:
    stored = np.load(BEFORE / "packed" / "logits.npz")
    images = (stored["pixels"].astype(np.float32) - 128) / 64
    logits = load(BEFORE / "packed" / f"{dtype}.safetensors", threads=1)(images)
    assert np.array_equal(logits, stored[dtype])


@pytest.mark.parametrize("dtype", ["bf16", "int8", "fp32"])
def test_a_classifier_packs_to_the_tensors_of_its_old_packed_file(tmp_path: Path, dtype: str) -> None:
    main(["pack", "weights/finetune.safetensors", str(tmp_path / "packed.safetensors"), "--dtype", dtype])
    assert largest_difference(tmp_path / "packed.safetensors", BEFORE / "packed" / f"{dtype}.safetensors") == 0


def test_a_pretraining_starts_from_an_old_ones_weights(tmp_path: Path) -> None:
    """At a learning rate of 0 its weights are the file's."""
    out, init = str(tmp_path / "run"), "weights/pretrain.safetensors"
    words = ["--init", init, "--seed", "1", "--optim.lr", "0", "--trainer.max_steps", "1"]
    main(["pretrain", "--config", "weights/pretrain.yaml", "--out", out, *words])
    assert largest_difference(tmp_path / "run" / "model.safetensors", BEFORE / init) == 0
