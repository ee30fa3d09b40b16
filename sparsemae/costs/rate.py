"""The rate of a training on this machine: optimizer steps as the loop takes them, for some seconds.

With its own images, read and augmented by its loader processes, where a plan knows them; else with blank ones.
"""

import logging
import platform
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle, repeat
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from sparsemae.data.loader import batches as loaded
from sparsemae.data.sampling import BatchPlan, TrainingSampler
from sparsemae.sparsity import MaskSchedule
from sparsemae.tasks.sparse import make_sparse
from sparsemae.tasks.task import Task
from sparsemae.training.device import PRECISIONS, resolved_compile, set_switches, training_forward
from sparsemae.training.optim import make_optimizer
from sparsemae.training.step import optimizer_step

SECONDS = 20.0
WARM_STEPS = 2
LOADER_SECONDS, LOADER_IMAGES = 2.0, 256


def measured_rate(task: Task[Any], plan: BatchPlan, precision: str, seconds: float = SECONDS) -> tuple[float, str]:
    """Images per second of one process, its micro-batches at learning rate 0, and which machine that is."""
    config = task.config
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it announces the precision
    fabric = Fabric(accelerator=config.trainer.accelerator, devices=1, precision=PRECISIONS[precision])
    model = task.build(task.card(), config.model.drop_path)
    make_sparse(model, config.sparse)
    task.prepare(model, fabric, plan)
    trainer = replace(config.trainer, precision=precision, compile=resolved_compile(config.trainer, fabric.device))
    set_switches(trainer)
    wrapped = training_forward(task.wrapped(model), trainer, fabric.device)
    forward, optimizer = fabric.setup(wrapped, make_optimizer(model.train(), config.optim))
    masks, found = MaskSchedule(model, in_bf16=precision == "bf16"), _images(task, plan, model)

    def backward() -> None:
        fabric.backward(task.loss(forward, fabric.to_device(next(found))))

    def step() -> float:
        optimizer_step(model, optimizer, masks.step(0.0), backward, config.sparse, config.optim)
        if fabric.device.type == "cuda":
            torch.cuda.synchronize()
        return time.monotonic()

    begin = [step() for _ in range(WARM_STEPS)][-1]
    steps, now = 0, begin
    while steps == 0 or now - begin < seconds:
        now, steps = step(), steps + 1
    return steps * plan.micro_batch / (now - begin) * plan.world, _machine(fabric.device, plan.world)


def loader_rate(task: Task[Any], model: torch.nn.Module, seconds: float = LOADER_SECONDS) -> float:
    """Images per second that one loader process reads and augments, of those of the task's data set."""
    dataset, threads = task.datasets(model)[0], torch.get_num_threads()
    torch.set_num_threads(1)  # as in a loader process
    begin, read = time.monotonic(), 0
    try:
        for index in cycle(range(0, len(dataset), max(1, len(dataset) // LOADER_IMAGES))):
            dataset[(0, index)]
            read += 1
            if time.monotonic() - begin > seconds:
                break
    finally:
        torch.set_num_threads(threads)
    return read / (time.monotonic() - begin)


def _images(task: Task[Any], plan: BatchPlan, model: torch.nn.Module) -> Iterator[Any]:
    if not task.sources:
        return repeat(task.example_batch(model, plan.micro_batch))
    dataset, _ = task.datasets(model)
    return loaded(dataset, TrainingSampler(plan, 0, 0, 0, 10**9), task.config.data.workers)


def _machine(device: torch.device, world: int) -> str:
    """Its name, and how many of it."""
    if device.type == "cuda":
        return f"{world} x {torch.cuda.get_device_name(device)}"
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2] for line in info.read_text().splitlines() if line.startswith("model name")] if (
        info.is_file()) else []  # fmt: skip
    return f"{(names or [platform.processor() or platform.machine()])[0].strip()}, {torch.get_num_threads()} threads"
