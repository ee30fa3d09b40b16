"""`make gpu` on a CPU: every part ends as it should, can fail, and is never called passed where time cut it off."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from conftest import ROOT, Figure
from torch import Tensor, nn

sys.path.insert(0, str(ROOT / "tools"))
from gpu import jobs, right, speed
from gpu.bench import Bench, Part
from gpu.parts import PARTS

from sparsemae.sparsity import linear

NEED_CUDA = {"kernel", "memory", "sparse-cores"}


@pytest.mark.holds_only
@pytest.mark.holds("fast.6")
def test_all_parts_pass_on_a_cpu_without_jsonargparse(tmp_path: Path, figure: Figure) -> None:
    (tmp_path / "jsonargparse.py").write_text("raise ImportError('not on a bare machine')")
    words = [sys.executable, "tools/gpu", "--device", "cpu", "--out", str(tmp_path / "out"), "--minutes", "30"]
    begin = time.monotonic()
    done = subprocess.run(
        words, env={**os.environ, "PYTHONPATH": str(tmp_path)}, cwd=ROOT, capture_output=True, text=True, check=False
    )
    figure(f"{time.monotonic() - begin:.0f} s")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    lines = [json.loads(line) for line in (tmp_path / "out/gpu.jsonl").read_text().splitlines()]
    ended = {line["part"]: line["verdict"] for line in lines if line["part"] in PARTS}
    assert ended == {part: "skipped: needs CUDA" if part in NEED_CUDA else "passed" for part in PARTS}
    assert not [line for line in lines if line["verdict"] in ("WRONG", "not run")]
    assert done.stdout.splitlines()[-1] == (tmp_path / "out/gpu.log").read_text().splitlines()[-1]


def judged(folder: Path, work: Callable[[Bench], None], limit: float = 60.0, minutes: float = 1.0) -> str:
    with Bench("cpu", folder, minutes) as bench:
        verdict = bench.run("part", Part(work, limit))
    last = json.loads((folder / "gpu.jsonl").read_text().splitlines()[-1])
    assert last["verdict"] == verdict
    return verdict


@pytest.mark.holds("fast.6")
def test_what_time_cuts_off_is_not_run(tmp_path: Path) -> None:
    def long(bench: Bench) -> None:
        bench.check("something", True)
        try:
            time.sleep(30)
        except Exception:  # as a job's own handlers might
            pytest.fail("nothing catches it")

    begin = time.monotonic()
    assert judged(tmp_path, long, limit=0.1) == "not run"
    assert judged(tmp_path, long, minutes=0.1 / 60) == "not run"
    assert judged(tmp_path, long, minutes=-1) == "not run"
    assert time.monotonic() - begin < 20


@pytest.mark.holds("fast.6")
def test_a_part_passes_only_by_what_it_found(tmp_path: Path) -> None:
    assert judged(tmp_path, lambda bench: bench.check("something", True)) == "passed"
    assert judged(tmp_path, lambda bench: None) == "failed"
    assert judged(tmp_path, lambda bench: bench.check("something", False)) == "failed"
    assert judged(tmp_path, lambda bench: bench.needs_cuda()) == "skipped: needs CUDA"

    def wrong_then_long(bench: Bench) -> None:
        bench.check("something", False)
        time.sleep(30)

    assert judged(tmp_path, wrong_then_long, limit=0.1) == "failed"


Weights = dict[str, Tensor]


@contextmanager
def runs(weights_of: Callable[[str], Weights]) -> Iterator[None]:
    """No job is trained; what each wrote is made up, by the name of its folder."""
    with (
        patch.object(jobs, "train"), patch.object(jobs, "small"), patch.object(right, "replace"),
        patch.object(right, "list_checkpoints", return_value=[1]),
        patch.object(jobs, "weights", lambda run: weights_of(Path(run).name)),
    ):  # fmt: skip
        yield


def ones(*different: str) -> Callable[[str], Weights]:
    return lambda name: {"w": torch.full((4,), 2.0 if name in different else 1.0)}


def frozen_run(kept: int, outside: float) -> Callable[[str], Weights]:
    mask = torch.arange(64).reshape(2, 32) % 32 < kept
    return lambda name: {"weight": torch.where(mask, 1.0, outside), "weight_mask": mask}


@contextmanager
def freezing_forgets() -> Iterator[None]:
    """The zeros of a frozen layer are not put back after a step."""

    def freeze(model: nn.Module) -> None:
        right_freeze(model)
        linear._frozen_layers.clear()

    right_freeze = right.freeze
    with patch.object(right, "freeze", freeze):
        yield


@contextmanager
def memory_error(said: str) -> Iterator[None]:
    with (
        patch.object(Bench, "needs_cuda"), patch("torch.cuda.mem_get_info", return_value=(1000, 1000)),
        patch.object(jobs, "small"), patch.object(right, "replace"),
        patch.object(jobs, "train", side_effect=ValueError(said)),
    ):  # fmt: skip
        yield


def other_loss_by_ddp(fabric: Any, model: Any, images: Tensor) -> None:
    inner = model._forward_module
    power = 4 if isinstance(inner, nn.parallel.DistributedDataParallel) else 2
    fabric.backward(model(images).pow(power).mean())


@contextmanager
def exported(factor: float) -> Iterator[None]:
    """What timm opens gives so many times the model's outputs."""

    class Model(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, images: Tensor) -> Tensor:
            return images.mean(1).flatten(1)[:, :10] * self.factor

    card = SimpleNamespace(input=SimpleNamespace(img_size=8))
    with (
        patch.object(jobs, "train"), patch.object(jobs, "small"), patch.object(right, "export"),
        patch.object(right, "load_model", return_value=(Model(1.0), card)),
        patch("timm.create_model", return_value=Model(factor)),
    ):  # fmt: skip
        yield


@contextmanager
def kernel(flip: bool) -> Iterator[None]:
    """A kernel of torch's operations; flipped it keeps the other weights."""

    def select(weight: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
        mask, kept = speed._by_torch(weight, speed.NMPattern(n, m))
        return mask ^ flip, kept

    fake = SimpleNamespace(select_in_one_pass=select)
    package = sys.modules["sparsemae.sparsity"]
    with (
        patch.object(Bench, "needs_cuda"), patch.dict(sys.modules, {"sparsemae.sparsity.kernel": fake}),  # type: ignore[dict-item]
        patch.object(package, "kernel", fake, create=True),
    ):  # fmt: skip
        yield


@contextmanager
def cores(factor: float) -> Iterator[None]:
    """Sparse weights are so many times the dense ones."""
    with (
        patch.object(Bench, "needs_cuda"),
        patch("torch.sparse.to_sparse_semi_structured", lambda weight: weight.detach() * factor),
    ):
        yield


random_masks = partial(patch.object, right, "nm_mask", lambda weight, pattern: torch.rand(weight.shape) > 0.5)
nan_images = partial(patch.object, speed, "_random_like", lambda value: value.float() * torch.nan)
nan_vit = partial(patch.object, nn.functional, "cross_entropy", lambda scores, target: scores.sum() * torch.nan)
noise = partial(patch.object, right.Crops, "to", lambda crops, device: torch.randint(0, 256, (len(crops), 3, 9, 9)))
broken = partial(patch.object, speed, "_step_rate", side_effect=RuntimeError("no step"))
BREAKS: dict[str, list[Callable[[], Any]]] = {
    "masks": [random_masks],
    "frozen": [freezing_forgets],
    "crops": [noise],
    "jobs": [partial(runs, ones("device", "again")), partial(runs, ones("again"))],
    "resume": [partial(runs, ones("cut")), partial(runs, ones("again", "cut"))],
    "kernel": [partial(kernel, True)],
    "peak": [partial(patch.object, speed, "_peak", side_effect=RuntimeError("no product"))],
    "timm": [nan_vit],
    "schedules": [partial(runs, frozen_run(3, 0.0)), partial(runs, frozen_run(2, 1e-9)), partial(runs, ones())],
    "compile": [partial(runs, ones("True"))],
    "memory": [partial(memory_error, "out of memory"), partial(memory_error, "something else about device_batch")],
    "nccl": [partial(patch.object, right, "_backward", other_loss_by_ddp)],
    "export": [partial(exported, 1.01)],
    "vitmae": [partial(patch.object, speed, "_rival", side_effect=RuntimeError("no step"))],
    "sparse-cores": [partial(cores, 1.2)],
    "finetune_t": [nan_images],
    **{f"{job}_{size}": [broken] for job, size in (
        ("pretrain", "t"), ("pretrain", "s"), ("finetune", "s"), ("segment", "t"), ("segment", "s"))},
}  # fmt: skip
HEALTHY: dict[str, Callable[[], Any]] = {
    "jobs": partial(runs, ones()), "resume": partial(runs, ones()), "kernel": partial(kernel, False),
    "schedules": partial(runs, frozen_run(2, 0.0)), "compile": partial(runs, ones()),
    "memory": partial(memory_error, "out of memory: device_batch 4"), "export": partial(exported, 1.0),
    "sparse-cores": partial(cores, 1.0),
}  # fmt: skip
"""The stand-ins of the breaks, unbroken: what fails there fails for the break."""


@pytest.mark.slow
@pytest.mark.holds("fast.6")
def test_every_part_can_fail(tmp_path: Path) -> None:
    """Each is broken; what costs a training has made-up runs, so that its judgment is broken alone."""
    assert BREAKS.keys() == PARTS.keys()
    ended = {}
    for part, breaks in BREAKS.items():
        for number, break_ in enumerate(breaks):
            with break_():
                ended[part, number] = judged(tmp_path, PARTS[part].work)
        if part in HEALTHY:
            with HEALTHY[part]():
                assert judged(tmp_path, PARTS[part].work) == "passed", part
    assert set(ended.values()) == {"failed"}, ended
