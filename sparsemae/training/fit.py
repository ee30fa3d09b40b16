"""The one training loop, for every task: `fit` runs optimizer steps, and ends well whatever happens.

An optimizer step is: set the rate; hold the masks; for each micro-batch seed the generators from (seed, step,
micro-batch number), forward, backward; add SR-STE's term once; agree with the other processes; step. A task brings its
loss as a function of one batch. Resuming needs weights, optimizer and the step counter: everything random is a
function of the seed and of counters.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import suppress
from statistics import fmean
from typing import Any, NamedTuple, NoReturn

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from sparsemae.data.classification import UnreadableImages, batches
from sparsemae.data.sampling import STEP, BatchPlan, TrainingSampler, seed_all
from sparsemae.sparsity import MaskSchedule, Topology, add_srste_gradient, hold_masks, iter_sparse, shrink_pruned
from sparsemae.training.bad_steps import bad_record
from sparsemae.training.checkpoint import list_checkpoints, remove_checkpoint
from sparsemae.training.feed import Feed
from sparsemae.training.logs import StepProgress
from sparsemae.training.optim import (
    OptimConfig,
    in_epochs,
    learning_rate,
    make_optimizer,
    scaled_to_batch,
    set_learning_rate,
)
from sparsemae.training.run import Run
from sparsemae.training.saver import Saver
from sparsemae.training.signals import STOPPED_STATUS, StopSignals
from sparsemae.training.state import TrainingState
from sparsemae.training.task import Task


class _Verdict(NamedTuple):
    """What all processes know of a step before they take it."""

    loss: float
    """Mean over all processes."""
    norm: float
    """Of the gradient."""
    ending: float
    """More than 0: some process wants the run to end after this step."""
    lost: float
    """More than 0: some process had no data, and the step is none."""

    @property
    def good(self) -> bool:
        """Whether the optimizer may see this gradient."""
        return not self.lost and math.isfinite(self.loss) and math.isfinite(self.norm)


def fit(run: Run, task: Task, optim: OptimConfig) -> dict[str, float]:
    """Run (or continue) a task's optimizer steps; returns the last evaluation's metrics, or an empty dict.

    Leaves in ``task.model`` the weights to write: those of the last step, or their moving average where there is one.
    Raises SystemExit with `STOPPED_STATUS` when a signal asked for the end and all is saved; ValueError when the run
    cannot go on (data, disk, memory, numbers), saying what is saved.
    """
    loop = _Loop(run, task, optim)
    with run.open(), loop.signals, loop.feed:
        loop.resume()
        return loop.run_all()


class _Loop:
    """One `fit`: what is computed on (plan, wrapped model, state), and what may end it (signals, feed, saver)."""

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
        model = task.model
        if fabric.device.type == "cpu" and run.precision == "bf16":
            use_plain_attention(model)
        # set up before resuming: optimizer state follows its parameters' device
        self.wrapped, self.optimizer = fabric.setup(self._compiled(), make_optimizer(model, optim))
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.state = TrainingState(  # after it: masks and the average live on the weights' device
            model, self.optimizer,
            average=None if trainer.ema_decay is None else ModelEmaV3(model, decay=trainer.ema_decay),
            masks=task.masks or MaskSchedule(model),
            topology=Topology(model) if any(iter_sparse(model)) else None,
        )  # fmt: skip
        self.unreadable = UnreadableImages(images, task.max_unreadable, run.log.say)
        self.signals = StopSignals(announce=fabric.is_global_zero)
        self.feed = Feed(
            self._loader_at, trainer.loader_retries, run.log.say, lambda: bool(self.signals.received),
            stuck_after=2 * trainer.loader_timeout_seconds if task.workers else None,
        )  # fmt: skip
        self.saver = Saver(run.checkpoints, trainer.keep_checkpoints, trainer.max_failed_saves, run.log.say)
        self.metrics: dict[str, float] = {}
        self.batch: Any = None
        """The last micro-batch; stands in for one that cannot be had, so that the other processes do not wait."""
        self.trouble: str | None = None
        """Why this process wants the run to end."""
        self.ending = False
        """All processes have agreed to end."""
        self.whole = True
        """Weights, optimizer and counters are those of one step: not half-way through an update."""

    def _compiled(self) -> nn.Module:
        """What `Fabric.setup` wraps; it compiles again around DDP, so that the all-reduces overlap."""
        forward, wanted = self.task.forward or self.task.model, self.run.trainer.compile
        if wanted == "auto":
            wanted = self.fabric.device.type == "cuda"
        return torch.compile(forward) if wanted else forward  # type: ignore[return-value]

    def resume(self) -> None:
        """Go back to the last unharmed checkpoint, if there are any.

        Damaged ones that are newer are removed, or they would outlive what is saved from here on.
        """
        run, state, harmed = self.run, self.state, []
        for path in reversed(list_checkpoints(run.checkpoints)):
            try:
                state.restore(path)
                break
            except ValueError as error:
                harmed.append(path)
                run.log.say(str(error))
        if harmed and not state.done:
            raise ValueError(f"{run.checkpoints}: no unharmed checkpoint to continue from; choose another --out")
        self.fabric.barrier()
        if self.fabric.is_global_zero:
            for path in harmed:
                remove_checkpoint(path)
        run.log.forget_after(state.done)
        self.saver.step = state.done
        if state.done:
            run.log.say(f"continuing {run.folder} at step {state.done}")

    def run_all(self) -> dict[str, float]:
        run, state = self.run, self.state
        if state.done < self.stop and self.fabric.is_global_zero:  # older than what comes now
            (run.folder / "model.safetensors").unlink(missing_ok=True)
        if state.done >= self.stop:
            run.log.say(f"{run.folder}: complete at step {state.done}; choose another --out for a new run")
        run.log.say(str(self.plan))
        self.task.model.train()
        self.saved_at = time.monotonic()
        try:
            with run.log.progress(self.task.title, state.done, self.stop, self.plan.global_batch) as progress:
                while True:
                    if state.booked < state.done:
                        self._keep_books(progress)
                    if state.done >= self.stop or self.ending:
                        break
                    self._step()
        except torch.OutOfMemoryError as error:
            self._save_in_need()
            raise ValueError(f"{self._memory_advice()}; {self._last_checkpoint()}") from error
        except Exception:
            self._save_in_need()
            raise
        if self.ending and (state.done < self.stop or self.trouble):
            self._end()
        self.saver.wait()
        if self.saver.failed:
            raise ValueError(f"{run.folder}: the last checkpoint could not be written; the same command goes on")
        if not self.metrics:
            self._evaluate()
        if state.average is not None:
            self.task.model.load_state_dict(state.average.module.state_dict())
            run.log.say(f"the weights written are the moving average of trainer.ema_decay {run.trainer.ema_decay:g}")
        return self.metrics

    def _step(self) -> None:
        """One optimizer step over its micro-batches, if all processes find it good."""
        state, model, strength = self.state, self.task.model, self.task.srste_strength
        epoch = state.done / self.plan.steps_per_epoch
        set_learning_rate(self.optimizer, learning_rate(self.optim, epoch, self.epochs))
        with state.masks.step(epoch) as sparse:
            losses, indices = self._accumulate()
            if sparse and strength and not self.task.srste_decoupled:
                add_srste_gradient(model, strength)
            norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
            verdict = self._agree(losses.sum(), norm)
            self.whole = False
            if verdict.good:
                if self.optim.clip_grad is not None:
                    nn.utils.clip_grads_with_norm_(self.parameters, self.optim.clip_grad, norm)
                self.optimizer.step()
                if sparse and strength and self.task.srste_decoupled:
                    shrink_pruned(self.optimizer, model, strength)
                if state.average is not None:
                    state.average.update(model)
        self.optimizer.zero_grad()
        self.ending = verdict.ending > 0
        if verdict.good:
            state.losses.append(verdict.loss)
        elif not verdict.lost:
            self._record_bad(verdict, losses, indices)
        state.bad.count(not verdict.good and not verdict.lost)
        state.done += not verdict.lost
        self.whole = True

    def _accumulate(self) -> tuple[Tensor, Tensor]:
        """Forward and backward of the micro-batches; their shares of the loss ``[K]`` and their images ``[K, B]``."""
        plan, losses, indices = self.plan, [], []
        for number in range(plan.accumulate):
            batch = self.fabric.to_device(self._micro_batch(number))
            seed_all(self.run.seed, STEP, self.state.done, plan.micro_batch_number(number, self.fabric.global_rank))
            with self.fabric.no_backward_sync(self.wrapped, enabled=number < plan.accumulate - 1):
                loss = self.task.loss_of(self.wrapped, batch) / plan.accumulate
                self.fabric.backward(loss)
            losses.append(loss.detach())
            indices.append(batch["index"])
        return torch.stack(losses), torch.stack(indices)

    def _micro_batch(self, number: int) -> Any:
        if self.trouble is None:
            try:
                self.batch = self.feed.micro_batch(self.state.done, number)
            except ValueError as error:
                if self.batch is None:
                    raise
                self.trouble = str(error)
        return self.batch

    def _loader_at(self, step: int) -> Iterator[Any]:
        sampler = TrainingSampler(self.plan, self.run.seed, self.fabric.global_rank, step, self.stop)
        pin, timeout = self.fabric.device.type == "cuda", self.run.trainer.loader_timeout_seconds
        return batches(self.task.dataset, sampler, self.task.workers, pin, self.unreadable, timeout)

    def _agree(self, loss: Tensor, norm: Tensor) -> _Verdict:
        """One all-reduce, and the step's one wait for the device: a NaN or a wish of any process reaches all."""
        self.saver.look()
        lost = self.trouble is not None
        ending = lost or self.signals.received is not None or self.saver.failure is not None
        flags = torch.tensor([ending, lost], dtype=loss.dtype, device=loss.device)
        mine = torch.cat([torch.stack([loss, norm.to(loss.dtype)]), flags])
        return _Verdict(*self.fabric.all_reduce(mine, reduce_op="mean").tolist())  # type: ignore[union-attr]

    def _record_bad(self, verdict: _Verdict, losses: Tensor, indices: Tensor) -> None:
        """Write down whose images a step without good numbers had; too many in a row end the run."""
        step, bad, gather = self.state.done + 1, self.state.bad, self.fabric.all_gather
        shape = (self.plan.world, self.plan.accumulate, self.plan.micro_batch)
        own = gather(losses * self.plan.accumulate).view(shape[:2])  # type: ignore[union-attr]
        record = bad_record(own, gather(indices).view(shape), self.task.filename)  # type: ignore[union-attr]
        numbers = {"loss": str(verdict.loss), "gradient_norm": str(verdict.norm)}
        self.run.log.write("bad-batches.jsonl", {"step": step, **numbers, "micro_batches": record})
        said = f"loss is {verdict.loss} at step {step}, the norm of its gradient {verdict.norm}"
        self.run.log.say(f"warning: step skipped: {said}; its images stand in bad-batches.jsonl")
        if bad.in_a_row + 1 >= self.run.trainer.max_bad_steps:
            self.ending = True
            self.trouble = f"{said}, bad step {bad.in_a_row + 1} in a row: try a lower --optim.lr and another --out"

    def _keep_books(self, progress: StepProgress) -> None:
        """Evaluation, logs, topology and checkpoints, each when due and all at the end.

        The evaluation comes first: should it fail, the step is saved, and the run that goes on keeps its books.
        """
        trainer, state, done, last = self.run.trainer, self.state, self.state.done, self.state.done == self.stop
        if last:
            state.masks.finish()
        epoch, within = divmod(done, self.plan.steps_per_epoch)
        where = {"step": done, "epoch": done / self.plan.steps_per_epoch}
        evaluated = self.task.evaluate is not None and (
            last or (within == 0 and epoch % trainer.evaluate_every_epochs == 0)
        )
        if evaluated:
            self._evaluate()
        if done % trainer.log_every_steps == 0 or last:
            self.unreadable.settle()
            loss = {"loss": fmean(state.losses)} if state.losses else {}
            lr = learning_rate(self.optim, (done - 1) / self.plan.steps_per_epoch, self.epochs)
            bad = {"bad_steps": state.bad.total} if state.bad.total else {}
            rate = {"images_per_second": progress.images_per_second(done)}
            self.run.log.write("metrics.jsonl", {**where, **loss, "lr": lr, **rate, **bad})
            progress.advance(done, f"loss {loss['loss']:.4f}" if loss else "no good step")
            state.losses.clear()
        if state.topology is not None and (within == 0 or done == self.total):
            moved = state.topology.update()
            layers = {name: vars(movement) for name, movement in moved.layers.items()}
            self.run.log.write("topology.jsonl", {**where, "total": vars(moved.total), "layers": layers})
        best = False
        if evaluated:
            self.run.log.write("metrics.jsonl", {**where, **self.metrics})
            wanted, higher = self.task.best_by, self.task.higher_is_better
            best = wanted is not None and state.is_best(self.metrics[wanted], higher)
        state.booked = done
        minutes = (time.monotonic() - self.saved_at) / 60
        timed = trainer.save_every_minutes is not None and minutes >= trainer.save_every_minutes
        if last or best or timed or done % trainer.save_every_steps == 0:
            self._save()

    def _evaluate(self) -> None:
        """Metrics of what would be written now: the average's where there is one, and the model's as ``raw_`` then."""
        if self.task.evaluate is None:
            return
        self.metrics = self._metrics_of(self.task.model)
        if self.state.average is not None:
            average = self.state.masks.share(self.state.average.module)
            raw = {f"raw_{name}": value for name, value in self.metrics.items()}
            self.metrics = {**self._metrics_of(average), **raw}

    def _metrics_of(self, model: nn.Module) -> dict[str, float]:
        assert self.task.evaluate is not None
        training = model.training
        model.eval()
        with hold_masks(model), torch.no_grad():
            metrics = self.task.evaluate(model)
        model.train(training)
        return metrics

    def _save(self) -> None:
        """Begin to write a checkpoint; only the first process does."""
        self.saved_at = time.monotonic()
        if self.fabric.is_global_zero:
            best = self.state.best
            files, metadata = self.state.to_save(self.task.description)
            self.saver.save(self.state.done, files, metadata, best=int(best["step"]) if best else None)

    def _save_in_need(self) -> None:
        """Before an error ends the run: a lost process, a failed evaluation, no memory. Its own errors do not count."""
        with suppress(Exception):
            self.saver.wait()
            if self.whole and self.state.done > self.saver.step:
                self._save()
                self.saver.wait()

    def _end(self) -> NoReturn:
        """Save and leave, all processes together; the first one says why, and gives the status."""
        unsaved = ""
        try:
            if self.state.done != self.saver.step or self.saver.failed:
                self._save()
            self.saver.wait()
        except ValueError as error:  # weights that are not finite
            unsaved = f"; not saved: {error}"
        trouble, signal = self.trouble or self.saver.failure, self.signals.received
        for rank in range(self.fabric.world_size):
            theirs = self.fabric.broadcast((trouble, signal), src=rank)
            trouble, signal = trouble or theirs[0], signal or theirs[1]
        if not self.fabric.is_global_zero:
            raise SystemExit(0)  # another status has launchers kill the first process
        last = f"{unsaved}; {self._last_checkpoint()}"
        if signal is None or unsaved or self.saver.failed:
            raise ValueError(f"{trouble or signal}{last}")
        self.run.log.say(f"ended by {signal} at step {self.state.done}{last}; the same command goes on")
        raise SystemExit(STOPPED_STATUS)

    def _last_checkpoint(self) -> str:
        kept = list_checkpoints(self.run.checkpoints)
        return f"the last checkpoint is {kept[-1] if kept else 'none'}"

    def _memory_advice(self) -> str:
        batch, share = self.plan.micro_batch, self.plan.micro_batch * self.plan.accumulate
        smaller = [size for size in range(1, batch // 2 + 1) if share % size == 0]
        advice = (
            f"--trainer.device_batch {smaller[-1]} takes about half of the activations' memory at the same global "
            f"batch of {self.plan.global_batch}, by accumulation (with --trainer.resume anyway in a run that has begun)"
            if smaller else "wanted a smaller model, more processes, or a larger device"
        )  # fmt: skip
        return f"out of memory on {self.fabric.device} with {batch} images per forward: {advice}"


def use_plain_attention(model: nn.Module) -> None:
    """torch's fused attention takes 3 to 15 times as long as its own matrix products in bf16 on a CPU."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]
