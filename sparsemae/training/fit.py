"""The one training loop, for every task: `start` prepares devices and folder, `fit` runs optimizer steps.

An optimizer step is: set the rate; hold the masks; for each micro-batch seed the generators from (seed, step,
micro-batch number), forward, backward; add SR-STE's term once; step. A task brings its loss as a function of one
batch. Resuming needs weights, optimizer and the step counter: everything random is a function of the seed and of
counters.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import Dataset

from sparsemae.data.classification import batches
from sparsemae.data.sampling import STEP, BatchPlan, TrainingSampler, seed_all
from sparsemae.sparsity import MaskSchedule, Topology, add_srste_gradient, hold_masks, iter_sparse, shrink_pruned
from sparsemae.sparsity.pattern import check_finite
from sparsemae.training.checkpoint import (
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
    remove_old_checkpoints,
    save_checkpoint,
    step_of,
)
from sparsemae.training.logs import RunLog, StepProgress, environment
from sparsemae.training.optim import (
    OptimConfig,
    in_epochs,
    learning_rate,
    make_optimizer,
    scaled_to_batch,
    set_learning_rate,
)

PRECISIONS: dict[str, Any] = {"bf16": "bf16-mixed", "fp32": "32-true", "fp64": "64-true"}
# Settings that may differ when a run is continued: they do not change what is computed.
MAY_CHANGE = ("out", "trainer.devices", "trainer.accelerator", "trainer.max_steps", "trainer.resume",
              "trainer.log_every_steps", "trainer.save_every_steps", "trainer.keep_checkpoints",
              "trainer.evaluate_every_epochs", "data.workers", "data.root")  # fmt: skip


@dataclass
class TrainerConfig:
    """Devices, batches and the run's bookkeeping."""

    epochs: float = 400.0
    """Length of the schedule, epochs."""
    steps: int | None = None
    """Length of the schedule in optimizer steps instead of epochs."""
    max_steps: int | None = None
    """Stop after this many optimizer steps, the schedule unchanged; None: run to its end."""
    global_batch: int = 4096
    """Images per optimizer step, over all devices and accumulation: what a recipe fixes."""
    device_batch: int | None = None
    """Images per device and forward; accumulation fills the global batch. None: global_batch / devices."""
    scale_lr: bool = False
    """Scale optim.lr by global_batch / optim.lr_batch (the linear rule)."""
    devices: int = 1
    """Processes, one device each."""
    num_nodes: int = 1
    """Machines."""
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to run."""
    precision: str = "auto"
    """bf16 (autocast), fp32, fp64 (for tests), or auto: bf16 where the device multiplies it, else fp32."""
    log_every_steps: int = 10
    """Optimizer steps between lines of metrics.jsonl."""
    save_every_steps: int = 1000
    """Optimizer steps between checkpoints; one is always written at the end."""
    keep_checkpoints: int = 2
    """Number of latest checkpoints kept."""
    evaluate_every_epochs: int = 1
    """Epochs between evaluations, where the task has one; the end is always evaluated."""
    resume: Literal["auto", "never"] = "auto"
    """auto: a run folder that holds a checkpoint continues from the last one; never: refuse such a folder."""

    def __post_init__(self) -> None:
        at_least_one = (
            "steps", "max_steps", "global_batch", "device_batch", "devices", "num_nodes", "log_every_steps",
            "save_every_steps", "keep_checkpoints", "evaluate_every_epochs",
        )  # fmt: skip
        for name in at_least_one:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"trainer.{name}: wanted at least 1, got {value}")
        if self.epochs <= 0:
            raise ValueError(f"trainer.epochs: wanted more than 0, got {self.epochs:g}")

    def schedule_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps from the start of the schedule to its end."""
        return self.steps or round(self.epochs * steps_per_epoch)


@dataclass
class Run:
    """The devices, and the folder that holds what comes out."""

    fabric: Fabric
    log: RunLog
    folder: Path
    trainer: TrainerConfig
    seed: int
    precision: str
    """What trainer.precision came to."""
    config: dict[str, Any]

    def open(self) -> None:
        """Write the folder's first files, once everything else is known to fit.

        Raises ValueError if the folder holds a run of another configuration, or somebody's files.
        """
        folder, kept = self.folder, self.folder / "environment.json"
        if list_checkpoints(folder / "checkpoints"):
            if self.trainer.resume == "never":
                raise ValueError(f"{folder}: holds a run already; wanted a new folder with trainer.resume=never")
            _refuse_other_config(folder / "config.yaml", self.config)
        elif folder.exists() and any(folder.iterdir()) and not kept.is_file():
            raise ValueError(f"--out: {folder}: wanted a new folder or that of a run, got one with other files")
        self.fabric.barrier()  # nobody writes before everybody has looked
        if self.fabric.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text(yaml.safe_dump(self.config, sort_keys=False))
            kept.write_text(json.dumps(environment(), indent=1))
        self.fabric.barrier()


def start(config: Any, trainer: TrainerConfig, out: str, seed: int) -> Run:
    """Launch the devices. ``config`` is the command's dataclass as a dict. Nothing is written before `Run.open`.

    Raises ValueError on settings that cannot work.
    """
    precision = resolved_precision(trainer)
    if precision not in PRECISIONS:
        reason = " (fp16's loss scale would multiply SR-STE's term, and its range loses small gradients)"
        raise ValueError(
            f"trainer.precision: wanted auto, {', '.join(PRECISIONS)}, got {trainer.precision}"
            + (reason if "16" in trainer.precision else "")
        )
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it announces the precision in every process
    try:
        fabric = Fabric(
            accelerator=trainer.accelerator, devices=trainer.devices, num_nodes=trainer.num_nodes,
            precision=PRECISIONS[precision],
        )  # fmt: skip
    except RuntimeError as error:
        raise ValueError(f"trainer.accelerator: {trainer.accelerator} cannot be had here: {error}") from error
    fabric.launch()
    folder = Path(out)
    return Run(fabric, RunLog(folder, fabric.is_global_zero), folder, trainer, seed, precision, config)


def resolved_precision(trainer: TrainerConfig) -> str:
    """What trainer.precision comes to on this machine.

    auto is bf16 on CUDA and on processors with AVX512-BF16; elsewhere a CPU emulates it, several times slower.
    """
    if trainer.precision != "auto":
        return trainer.precision
    if trainer.accelerator != "cpu" and torch.cuda.is_available():
        return "bf16"
    return "bf16" if getattr(torch.cpu, "_is_avx512_bf16_supported", bool)() else "fp32"


def _refuse_other_config(file: Path, config: dict[str, Any]) -> None:
    try:
        before = _flat(yaml.safe_load(file.read_text()))
    except (OSError, yaml.YAMLError, AttributeError) as error:
        raise ValueError(f"{file}: wanted the configuration of the run to continue: {error}") from error
    now = _flat(config)
    changed = [key for key in sorted(before | now) if key not in MAY_CHANGE and before.get(key) != now.get(key)]
    if changed:
        shown = ", ".join(f"{key} was {before.get(key)}, is {now.get(key)}" for key in changed[:4])
        raise ValueError(f"{file.parent}: holds a run with another configuration ({shown}); choose another --out")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves |= _flat(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = list(value) if isinstance(value, tuple) else value
    return leaves


@dataclass
class Task:
    """What a task brings to the loop."""

    model: nn.Module
    """The plain module; the loop wraps it for the devices."""
    dataset: Dataset[Any]
    """Map-style, indexed by (epoch, index)."""
    loss_of: Callable[[nn.Module, dict[str, Any]], Tensor]
    """(wrapped model, batch on the device) -> scalar loss, a mean over the micro-batch."""
    description: dict[str, Any]
    """Goes into the weights files."""
    title: str = "training"
    srste_strength: float = 0.0
    """lambda of SR-STE's term; 0 is plain straight-through."""
    srste_decoupled: bool = False
    """The term as a shrink after the step instead of inside the gradient."""
    masks: MaskSchedule | None = None
    """How the masks change over the training; None: they move from the first step to the last."""
    workers: int = 0
    """Loader processes per device."""
    evaluate: Callable[[], dict[str, float]] | None = None
    """Called between steps, model in evaluation mode, masks held; returns metrics."""


def fit(run: Run, task: Task, optim: OptimConfig) -> dict[str, float]:
    """Run (or continue) a task's optimizer steps; returns the last evaluation's metrics, or an empty dict."""
    return _Loop(run, task, optim).run_all()


class _Loop:
    """The state of one `fit`: plan, wrapped model, optimizer, topology, and the step counter."""

    def __init__(self, run: Run, task: Task, optim: OptimConfig) -> None:
        trainer, fabric = run.trainer, run.fabric
        if trainer.scale_lr:
            optim = scaled_to_batch(optim, trainer.global_batch)
        images = len(task.dataset)  # type: ignore[arg-type]
        self.plan = BatchPlan.make(images, trainer.global_batch, trainer.device_batch, fabric.world_size)
        self.total = trainer.schedule_steps(self.plan.steps_per_epoch)
        self.epochs = self.total / self.plan.steps_per_epoch
        optim = in_epochs(optim, self.plan.steps_per_epoch, self.total)
        self.run, self.task, self.optim, self.fabric = run, task, optim, fabric
        self.stop = self.total if trainer.max_steps is None else min(self.total, trainer.max_steps)
        if fabric.device.type == "cpu" and run.precision == "bf16":
            use_plain_attention(task.model)
        # set up before resuming: optimizer state follows its parameters' device
        self.wrapped, self.optimizer = fabric.setup(task.model, make_optimizer(task.model, optim))
        # after it: masks live on the weights' device
        self.masks = task.masks or MaskSchedule(task.model)
        self.topology = Topology(task.model) if any(iter_sparse(task.model)) else None
        run.open()
        self.checkpoints = run.folder / "checkpoints"
        self.metrics: dict[str, float] = {}
        self.losses: list[Tensor] = []
        self.done = self._resume()
        """Optimizer steps taken so far."""

    def run_all(self) -> dict[str, float]:
        if self.done < self.stop and self.fabric.is_global_zero:  # older than what comes now
            (self.run.folder / "model.safetensors").unlink(missing_ok=True)
        if self.done >= self.stop:
            self.run.log.say(f"{self.run.folder}: complete at step {self.done}; choose another --out for a new run")
        sampler = TrainingSampler(self.plan, self.run.seed, self.fabric.global_rank, self.done, self.stop)
        feed = batches(self.task.dataset, sampler, self.task.workers, pin_memory=self.fabric.device.type == "cuda")
        self.task.model.train()
        with self.run.log.progress(self.task.title, self.done, self.stop, self.plan.global_batch) as progress:
            while self.done < self.stop:
                self._step(feed)
                self._keep_books(progress)
        if not self.metrics:
            self._evaluate()
        return self.metrics

    def _step(self, feed: Iterator[Any]) -> None:
        """One optimizer step over its micro-batches."""
        epoch = self.done / self.plan.steps_per_epoch
        self.lr = learning_rate(self.optim, epoch, self.epochs)
        set_learning_rate(self.optimizer, self.lr)
        model, strength = self.task.model, self.task.srste_strength
        with self.masks.step(epoch) as sparse:
            self.losses.append(self._accumulate(feed))
            if sparse and strength and not self.task.srste_decoupled:
                add_srste_gradient(model, strength)
            if self.optim.clip_grad is not None:
                self.fabric.clip_gradients(self.wrapped, self.optimizer, max_norm=self.optim.clip_grad)
            self.optimizer.step()
            if sparse and strength and self.task.srste_decoupled:
                shrink_pruned(self.optimizer, model, strength)
        self.optimizer.zero_grad()
        self.done += 1

    def _accumulate(self, feed: Iterator[Any]) -> Tensor:
        """Forward and backward of the micro-batches; returns the mean loss, on the device."""
        plan, total = self.plan, torch.zeros((), device=self.fabric.device)
        for accumulation in range(plan.accumulate):
            seed_all(self.run.seed, STEP, self.done, plan.micro_batch_number(accumulation, self.fabric.global_rank))
            with self.fabric.no_backward_sync(self.wrapped, enabled=accumulation < plan.accumulate - 1):
                loss = self.task.loss_of(self.wrapped, self.fabric.to_device(next(feed))) / plan.accumulate
                self.fabric.backward(loss)
            total += loss.detach()
        return total

    def _keep_books(self, progress: StepProgress) -> None:
        """Logs, topology, evaluation and checkpoints, each when due and all at the end."""
        trainer, done, last = self.run.trainer, self.done, self.done == self.stop
        if last:
            self.masks.finish()
        epoch, within = divmod(done, self.plan.steps_per_epoch)
        where = {"step": done, "epoch": done / self.plan.steps_per_epoch}
        save = done % trainer.save_every_steps == 0 or last
        if done % trainer.log_every_steps == 0 or save:  # at each checkpoint too: its loss is known to be finite
            loss = self._mean_loss()
            rate = progress.images_per_second(done)
            self.run.log.write("metrics.jsonl", {**where, "loss": loss, "lr": self.lr, "images_per_second": rate})
            progress.advance(done, f"loss {loss:.4f}")
        if self.topology is not None and (within == 0 or done == self.total):
            moved = self.topology.update()
            layers = {name: vars(movement) for name, movement in moved.layers.items()}
            self.run.log.write("topology.jsonl", {**where, "total": vars(moved.total), "layers": layers})
        if self.task.evaluate is not None and (last or (within == 0 and epoch % trainer.evaluate_every_epochs == 0)):
            self._evaluate()
            self.run.log.write("metrics.jsonl", {**where, **self.metrics})
        if save:
            self._save()

    def _mean_loss(self) -> float:
        """Mean over the steps since the last look and over all processes."""
        loss = float(self.fabric.all_reduce(torch.stack(self.losses).mean(), reduce_op="mean"))  # type: ignore[arg-type]
        self.losses.clear()
        if not math.isfinite(loss):
            raise ValueError(
                f"loss is {loss} at step {self.done}: start again with a lower --optim.lr and another --out"
            )
        return loss

    def _evaluate(self) -> None:
        model, evaluate = self.task.model, self.task.evaluate
        if evaluate is None:
            return
        model.eval()
        with hold_masks(model), torch.no_grad():
            self.metrics = evaluate()
        model.train()

    def _save(self) -> None:
        for name, layer in iter_sparse(self.task.model):
            check_finite(layer.weight, name)
        if self.fabric.is_global_zero:
            state = {
                "optimizer": self.optimizer.state_dict(),
                "topology": self.topology.state_dict() if self.topology else {},
                "masks": self.masks.state_dict(),
            }
            description = {**self.task.description, "step": self.done}
            path = checkpoint_path(self.checkpoints, self.done)
            save_checkpoint(path, self.task.model, description, state)
            remove_old_checkpoints(self.checkpoints, self.run.trainer.keep_checkpoints)
        self.fabric.barrier()

    def _resume(self) -> int:
        """Load the last unharmed checkpoint; returns its step, 0 if the run has none yet.

        Damaged ones that are newer are removed, or they would outlive what is saved from here on.
        """
        found, harmed = list_checkpoints(self.checkpoints), []
        for path in reversed(found):
            try:
                state = load_checkpoint(path, self.task.model)
            except ValueError as error:
                harmed.append(path)
                self.run.log.say(str(error))
                continue
            self.optimizer.load_state_dict(state["optimizer"])
            self.masks.load_state_dict(state["masks"])
            if self.topology is not None:
                self.topology.load_state_dict(state["topology"])
            self.fabric.barrier()
            if self.fabric.is_global_zero:
                for damaged in harmed:
                    shutil.rmtree(damaged)
            self.run.log.forget_after(step_of(path))
            self.run.log.say(f"continuing {self.run.folder} at step {step_of(path)}")
            return step_of(path)
        if harmed:
            raise ValueError(f"{self.checkpoints}: no unharmed checkpoint to continue from; choose another --out")
        self.run.log.forget_after(0)
        return 0


def use_plain_attention(model: nn.Module) -> None:
    """torch's fused attention takes 3 to 15 times as long as its own matrix products in bf16 on a CPU."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]
