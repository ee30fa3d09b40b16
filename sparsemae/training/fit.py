"""The one training loop, for every task: `start` prepares devices and folder, `fit` runs optimizer steps.

An optimizer step is: set the rate; hold the masks; for each micro-batch seed the generators from (seed, step,
micro-batch number), forward, backward; add SR-STE's term once; step. A task brings its loss as a function of one
batch. Resuming needs weights, optimizer and the step counter: everything random is a function of the seed and of
counters.
"""

from __future__ import annotations

import json
import warnings
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
from sparsemae.sparsity import Topology, add_srste_gradient, hold_masks, iter_sparse
from sparsemae.training.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from sparsemae.training.logs import RunLog, environment
from sparsemae.training.optim import OptimConfig, learning_rate, set_learning_rate

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
    max_steps: int | None = None
    """Stop after this many optimizer steps, the schedule unchanged; None: run all epochs."""
    global_batch: int = 4096
    """Images per optimizer step, over all devices and accumulation: what a recipe fixes."""
    device_batch: int | None = None
    """Images per device and forward; accumulation fills the global batch. None: global_batch / devices."""
    devices: int = 1
    """Processes, one device each."""
    num_nodes: int = 1
    """Machines."""
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to run."""
    precision: str = "bf16"
    """bf16 (autocast), fp32, or fp64 for tests."""
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


@dataclass
class Run:
    """What `start` prepared."""

    fabric: Fabric
    log: RunLog
    folder: Path
    trainer: TrainerConfig
    seed: int


def start(config: Any, trainer: TrainerConfig, out: str, seed: int) -> Run:
    """Launch the devices and open the run's folder. ``config`` is the command's dataclass, as `as_dict` takes it.

    Raises ValueError on settings that cannot work, or a folder that holds another run.
    """
    if trainer.precision not in PRECISIONS:
        reason = " (fp16's loss scale would multiply SR-STE's term, and its range loses small gradients)"
        raise ValueError(
            f"trainer.precision: wanted {', '.join(PRECISIONS)}, got {trainer.precision}"
            + (reason if "16" in trainer.precision else "")
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tensorboardX.*")
        fabric = Fabric(
            accelerator=trainer.accelerator, devices=trainer.devices, num_nodes=trainer.num_nodes,
            precision=PRECISIONS[trainer.precision],
        )  # fmt: skip
        fabric.launch()
    folder = Path(out)
    fabric.barrier()
    log = RunLog(folder, active=fabric.is_global_zero)
    if list_checkpoints(folder / "checkpoints"):
        if trainer.resume == "never":
            raise ValueError(f"{folder}: holds a run already; wanted a new folder with trainer.resume=never")
        _refuse_other_config(folder / "config.yaml", config)
    if fabric.is_global_zero:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        (folder / "environment.json").write_text(json.dumps(environment(), indent=1))
    fabric.barrier()
    return Run(fabric, log, folder, trainer, seed)


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


def fit(
    run: Run,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    dataset: Dataset[Any],
    loss_of: Callable[[nn.Module, dict[str, Any]], Tensor],
    optim: OptimConfig,
    description: dict[str, Any],
    srste_strength: float = 0.0,
    workers: int = 0,
    evaluate: Callable[[], dict[str, float]] | None = None,
    title: str = "training",
) -> dict[str, float]:
    """Run (or continue) the optimizer steps of a task.

    Args:
        model: the plain module; `fit` wraps it for the devices.
        dataset: map-style, indexed by (epoch, index).
        loss_of: ``(wrapped model, batch on the device) -> scalar loss``, a mean over the micro-batch.
        description: goes into the weights files.
        srste_strength: lambda of SR-STE's term; 0 is plain straight-through.
        workers: loader processes per device.
        evaluate: called between steps with the masks held; returns metrics.

    Returns:
        The last evaluation's metrics, or an empty dict.
    """
    fabric, trainer, log = run.fabric, run.trainer, run.log
    plan = BatchPlan.make(len(dataset), trainer.global_batch, trainer.device_batch, fabric.world_size)  # type: ignore[arg-type]
    total = round(trainer.epochs * plan.steps_per_epoch)
    stop = min(total, trainer.max_steps or total)
    topology = Topology(model) if any(iter_sparse(model)) else None
    checkpoints = run.folder / "checkpoints"
    wrapped, optimizer = fabric.setup(model, optimizer)  # first: optimizer state follows its parameters' device
    step = _resume(run, model, optimizer, topology, checkpoints)
    if step >= stop:
        log.say(f"{run.folder}: complete at step {step}; choose another --out for a new run")

    def save(at: int) -> None:
        if fabric.is_global_zero:
            state = {"optimizer": optimizer.state_dict(), "topology": topology.state_dict() if topology else {}}
            save_checkpoint(checkpoints, at, model, {**description, "step": at}, state, trainer.keep_checkpoints)
        fabric.barrier()

    metrics: dict[str, float] = {}
    sampler = TrainingSampler(plan, run.seed, fabric.global_rank, step, stop)
    feed = batches(dataset, sampler, workers, pin_memory=fabric.device.type == "cuda")
    model.train()
    losses: list[Tensor] = []
    with log.progress(title, step, stop, plan.global_batch) as progress:
        for step in range(step, stop):
            lr = learning_rate(optim, step / plan.steps_per_epoch, trainer.epochs)
            set_learning_rate(optimizer, lr)
            with hold_masks(model):
                losses.append(_accumulate(run, plan, wrapped, feed, loss_of, step))
                if srste_strength:
                    add_srste_gradient(model, srste_strength)
            if optim.clip_grad is not None:
                fabric.clip_gradients(wrapped, optimizer, max_norm=optim.clip_grad)
            optimizer.step()
            optimizer.zero_grad()

            done = step + 1
            epoch = done / plan.steps_per_epoch
            if done % trainer.log_every_steps == 0 or done == stop:
                loss = _mean_loss(fabric, losses, done)
                losses.clear()
                record = {"step": done, "epoch": epoch, "loss": loss, "lr": lr}
                log.write("metrics.jsonl", {**record, "images_per_second": progress.images_per_second(done)})
                progress.advance(done, f"loss {loss:.4f}")
            end_of_epoch = done % plan.steps_per_epoch == 0
            if topology is not None and (end_of_epoch or done == stop):
                moved = topology.update()
                layers = {name: vars(movement) for name, movement in moved.layers.items()}
                log.write("topology.jsonl", {"step": done, "total": vars(moved.total), "layers": layers})
            due = end_of_epoch and done // plan.steps_per_epoch % trainer.evaluate_every_epochs == 0
            if evaluate is not None and (due or done == stop):
                metrics = _evaluate(model, evaluate)
                log.write("metrics.jsonl", {"step": done, "epoch": epoch, **metrics})
            if done % trainer.save_every_steps == 0 or done == stop:
                save(done)
    return metrics or (_evaluate(model, evaluate) if evaluate is not None else {})


def _accumulate(run: Run, plan: BatchPlan, wrapped: Any, feed: Iterator[Any], loss_of: Any, step: int) -> Tensor:
    """Forward and backward over the micro-batches of one optimizer step; returns the mean loss, on the device."""
    fabric, total = run.fabric, torch.zeros((), device=run.fabric.device)
    for accumulation in range(plan.accumulate):
        seed_all(run.seed, STEP, step, accumulation * plan.world + fabric.global_rank)
        last = accumulation == plan.accumulate - 1
        with fabric.no_backward_sync(wrapped, enabled=not last):
            loss = loss_of(wrapped, fabric.to_device(next(feed)))
            fabric.backward(loss / plan.accumulate)
        total += loss.detach().float() / plan.accumulate
    return total


def _mean_loss(fabric: Fabric, losses: list[Tensor], step: int) -> float:
    loss = float(fabric.all_reduce(torch.stack(losses).mean(), reduce_op="mean"))  # type: ignore[arg-type]
    if not torch.isfinite(torch.tensor(loss)):
        raise ValueError(f"loss is {loss} at step {step}: lower optim.lr, or continue from an earlier checkpoint")
    return loss


def _evaluate(model: nn.Module, evaluate: Callable[[], dict[str, float]]) -> dict[str, float]:
    model.eval()
    with hold_masks(model), torch.no_grad():
        metrics = evaluate()
    model.train()
    return metrics


def _resume(
    run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, topology: Topology | None, folder: Path
) -> int:
    """Load the last unharmed checkpoint; returns its step, 0 if there is none."""
    for path in reversed(list_checkpoints(folder)):
        try:
            state = load_checkpoint(path, model)
        except ValueError as error:
            run.log.say(f"{error}; trying the one before it")
            continue
        optimizer.load_state_dict(state["optimizer"])
        if topology is not None:
            topology.load_state_dict(state["topology"])
        step = int(state["step"])
        run.log.forget_after(step)
        run.log.say(f"continuing {run.folder} at step {step}")
        return step
    return 0
