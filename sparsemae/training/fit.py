"""The one training loop, for every task: `fit` runs optimizer steps, and ends well whatever happens.

An optimizer step (`step.optimizer_step`) is: set the rate; hold the masks; for each micro-batch seed the generators
from (seed, step, micro-batch number), forward, backward; add SR-STE's term once; agree with the other processes; step.
A task brings its loss as a function of one batch. Resuming needs weights, optimizer and the step counter: everything
random is a function of the seed and of counters.
"""

import math
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from statistics import fmean
from typing import Any, NoReturn

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from sparsemae.data.draws import STEP
from sparsemae.data.loader import UnreadableImages, batches
from sparsemae.data.sampling import TrainingSampler, seed_all
from sparsemae.files import retried
from sparsemae.sparsity import Topology, hold_masks, iter_sparse
from sparsemae.training import checkpoint, feed, saver, signals
from sparsemae.training.device import training_forward
from sparsemae.training.group import last_line
from sparsemae.training.logs import StepProgress, package_versions
from sparsemae.training.optim import in_epochs, learning_rate, make_optimizer, scaled_to_batch, set_learning_rate
from sparsemae.training.run import Run
from sparsemae.training.state import TrainingState, bad_record
from sparsemae.training.step import StepVerdict, memory_advice, optimizer_step
from sparsemae.training.subject import Fitted, Subject


def fit(run: Run, subject: Subject) -> Fitted:
    """Run (or continue) the optimizer steps.

    Leaves in ``subject.model`` the weights to write: those of the last step or, by trainer.keep, of the best epoch, or
    their moving average if there is one.
    Raises SystemExit with `STOPPED_STATUS` when a signal asked for the end and all is saved; ValueError when the run
    cannot go on (data, disk, memory, numbers), saying what is saved.
    """
    loop = _Loop(run, subject)
    with run.open(), loop.signals, loop.feed:
        loop.resume()
        loop.run_all()
        return loop.fitted()


class _Loop:
    """One `fit`: what is computed on (plan, wrapped model, state), and what may end it (signals, feed, saver)."""

    def __init__(self, run: Run, subject: Subject) -> None:
        trainer, fabric, config = run.trainer, run.fabric, subject.task.config
        optim = config.optim
        if trainer.scale_lr:
            optim = scaled_to_batch(optim, trainer.global_batch)
        images = len(subject.dataset)
        self.plan = subject.batches
        self.total = trainer.schedule_steps(self.plan.steps_per_epoch)
        self.epochs = self.total / self.plan.steps_per_epoch
        optim = in_epochs(optim, self.plan.steps_per_epoch, self.total)
        self.run, self.subject, self.task, self.optim, self.fabric = run, subject, subject.task, optim, fabric
        self.stop = self.total if trainer.max_steps is None else min(self.total, trainer.max_steps)
        self.model = model = subject.model
        forward = training_forward(subject.forward, trainer, fabric.device)
        # set up before resuming: optimizer state follows its parameters' device. Fabric compiles again around DDP, so
        # that the all-reduces overlap
        self.wrapped, self.optimizer = fabric.setup(forward, make_optimizer(model, optim))
        self.state = TrainingState(  # after it: masks and the average live on the weights' device
            model, self.optimizer,
            average=None if trainer.ema_decay is None else ModelEmaV3(model, decay=trainer.ema_decay),
            masks=subject.masks,
            topology=Topology(model) if any(iter_sparse(model)) else None,
            origin={"config": run.config, "packages": package_versions(), "images": subject.images},
        )  # fmt: skip
        self.unreadable = UnreadableImages(images, config.data.max_unreadable, run.log.info)
        self.group = run.group
        self.signals = signals.StopSignals(announce=fabric.is_global_zero)
        self.feed = feed.Feed(
            self._loader_at, trainer.loader_retries, run.log.info, lambda: bool(self.signals.received),
            hang_timeout=2 * trainer.loader_timeout_seconds if config.data.workers else None,
        )  # fmt: skip
        self.saver = saver.Saver(run.checkpoints, trainer.keep_checkpoints, trainer.max_failed_saves, run.log.info)
        self.metrics: dict[str, float] = {}
        self.batch: Any = None
        """The last micro-batch; stands in for one that cannot be had, so that the other processes do not wait."""
        self.stop_reason: str | None = None
        """Why this process wants the run to end."""
        self.ending = False
        """All processes have agreed to end."""
        self.whole = threading.Lock()
        """Held while weights, optimizer and counters are not those of one step, but half-way to the next; and, once
        they are saved because of a failure, for good."""
        self.updated = torch.cuda.Event() if fabric.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        """On the device, the last update is done."""

    def resume(self) -> None:
        """Go back to the last intact checkpoint, if there are any.

        Damaged ones that are newer are set aside, or they would outlive what is saved from here on. Raises ValueError,
        and leaves all as it is, if one cannot be read for another reason.
        """
        run, state = self.run, self.state
        counters, damaged = state.restore_newest(run.checkpoints, run.log.info)
        self.group.agree(state.identity)
        if self.fabric.is_global_zero:
            for path in damaged:
                checkpoint.set_aside(path)
        run.log.truncate_after(state.done)
        run.log.mirror(self.task.config.loggers, run.config)
        self.saver.step = state.done
        self.group.rescue = self._rescue
        if state.done:
            run.log.info(f"continuing {run.folder} at step {state.done}")
            now, before = state.origin["packages"], counters.get("packages", {})
            for name in (name for name in now if before.get(name, now[name]) != now[name]):
                run.log.info(f"warning: {name} was {before[name]} and is {now[name]}: results may differ")

    def run_all(self) -> None:
        """Step, evaluate, log and save until the schedule's end, or until something ends the run before."""
        run, state = self.run, self.state
        if state.done < self.stop and self.fabric.is_global_zero:
            run.write_environment()
            (run.folder / "model.safetensors").unlink(missing_ok=True)  # older than what comes now
        if state.done >= self.stop:
            run.log.info(f"{run.folder}: complete at step {state.done}; choose another --out for a new run")
        run.log.info(str(self.plan))
        self.model.train()
        self.saved_at = time.monotonic()
        try:
            with run.log.progress(self.task.title, state.done, self.stop, self.plan.global_batch) as progress:
                while True:
                    if state.logged_through < state.done:
                        self._after_step(progress)
                    self._lose_patience()
                    if state.done >= self.stop or self.ending:
                        break
                    self._step()
        except Exception as error:
            memory = isinstance(error, torch.OutOfMemoryError)
            self.group.fail(ValueError(memory_advice(self.plan, self.fabric.device)) if memory else error)
        if self.ending and (state.done < self.stop or self.stop_reason):
            self._end()
        self.saver.wait()
        if self.saver.failed or self.stop_reason:
            raise ValueError(
                self.stop_reason or f"{run.folder}: the last checkpoint could not be written; the same command goes on"
            )
        if not self.metrics:
            self._evaluate()

    def fitted(self) -> Fitted:
        """Put the weights to write into the model, and say which they are."""
        run, state, last = self.run, self.state, self.state.done
        best = None if state.best is None else int(state.best["step"])
        if run.trainer.keep == "best" and best not in (None, last):
            there = self.fabric.broadcast(self.saver.best)  # of the first process, which has written it
            if there not in (None, best):
                run.log.info(
                    f"warning: the best, of step {best}, could not be written: it is step {there} that is kept"
                )
                best = there
        if run.trainer.keep == "best" and best not in (None, last):
            retried(state.restore, checkpoint.checkpoint_path(run.checkpoints, best), run.log.info)
        if state.average is not None:
            self.model.load_state_dict(state.average.module.state_dict())
            run.log.info(f"the weights written are the moving average of trainer.ema_decay {run.trainer.ema_decay:g}")
        per_epoch = self.plan.steps_per_epoch
        return Fitted(self.metrics, last / per_epoch, state.done / per_epoch, best and best / per_epoch)

    def _step(self) -> None:
        """One optimizer step over its micro-batches, if all processes find it good."""
        state, epoch = self.state, self.state.done / self.plan.steps_per_epoch
        frozen = self.optim.freeze_variance_epoch is not None and epoch >= self.optim.freeze_variance_epoch
        set_learning_rate(self.optimizer, learning_rate(self.optim, epoch, self.epochs), frozen)
        verdict, losses, indices = StepVerdict(0.0, 0.0, 0.0, 0.0), torch.empty(0), torch.empty(0)

        def backward() -> None:
            nonlocal losses, indices
            losses, indices = self._accumulate()

        def accept(norm: Tensor) -> bool:
            nonlocal verdict
            self.group.at(f"all-reduce of step {state.done + 1}")
            verdict = self._agree(losses.sum(), norm)
            if verdict.good:
                self.whole.acquire()
            return verdict.good

        masks, sparse = state.masks.step(epoch), self.task.config.sparse
        if optimizer_step(self.model, self.optimizer, masks, backward, sparse, self.optim, accept):
            state.losses.append(verdict.loss)
            if state.average is not None:
                state.average.update(self.model)
        else:
            if not verdict.no_data:
                self._record_bad(verdict, losses, indices)
            self.whole.acquire()
        self.ending = self.ending or verdict.ending > 0
        state.bad.count(not verdict.good and not verdict.no_data)
        state.done += not verdict.no_data
        if self.updated is not None:
            self.updated.record()
        self.whole.release()

    def _accumulate(self) -> tuple[Tensor, Tensor]:
        """Forward and backward of the micro-batches; their parts of the loss ``[K]`` and their images ``[K, B]``."""
        plan, losses, indices, step = self.plan, [], [], f"of step {self.state.done + 1}"
        for number in range(plan.accumulate):
            self.group.at(f"data {step}")
            batch = self.fabric.to_device(self._micro_batch(number))
            self.group.at(f"forward {step}")
            seed_all(self.run.seed, STEP, self.state.done, plan.micro_batch_number(number, self.fabric.global_rank))
            with self.fabric.no_backward_sync(self.wrapped, enabled=number < plan.accumulate - 1):
                loss = self.task.loss(self.wrapped, batch) / plan.accumulate
                self.group.at(f"backward {step}")
                self.fabric.backward(loss)
            losses.append(loss.detach())
            indices.append(batch["index"])
        return torch.stack(losses), torch.stack(indices)

    def _micro_batch(self, number: int) -> Any:
        if self.stop_reason is None:
            try:
                self.batch = self.feed.micro_batch(self.state.done, number)
            except Exception as error:
                if self.batch is None or (self.group.world == 1 and not isinstance(error, ValueError)):
                    raise
                self.stop_reason = str(error) if isinstance(error, ValueError) else last_line(error)
        return self.batch

    def _loader_at(self, step: int) -> Iterator[Any]:
        sampler = TrainingSampler(self.plan, self.run.seed, self.fabric.global_rank, step, self.stop)
        pin, timeout = self.fabric.device.type == "cuda", self.run.trainer.loader_timeout_seconds
        return batches(self.subject.dataset, sampler, self.task.config.data.workers, pin, self.unreadable, timeout)

    def _agree(self, loss: Tensor, norm: Tensor) -> StepVerdict:
        """One all-reduce, and the step's one wait for the device: a NaN or a wish of any process reaches all."""
        self.saver.poll()
        no_data = self.stop_reason is not None
        ending = no_data or self.signals.received is not None or self.saver.failure is not None
        mine = torch.stack([loss, norm.to(loss.dtype), *loss.new_tensor([ending, no_data])])
        return StepVerdict(*self.fabric.all_reduce(mine, reduce_op="mean").tolist())  # type: ignore[union-attr]

    def _record_bad(self, verdict: StepVerdict, losses: Tensor, indices: Tensor) -> None:
        """Write down whose images a step without good numbers had; too many in a row end the run."""
        step, bad, gather = self.state.done + 1, self.state.bad, self.fabric.all_gather
        shape = (self.plan.world, self.plan.accumulate, self.plan.micro_batch)
        own = gather(losses * self.plan.accumulate).view(shape[:2])  # type: ignore[union-attr]
        images, filename = gather(indices), self.subject.dataset.source.filename
        record = bad_record(own, images.view(shape), filename)  # type: ignore[union-attr]
        self.run.log.write(
            "bad-batches.jsonl",
            {"step": step, "loss": str(verdict.loss), "gradient_norm": str(verdict.norm), "micro_batches": record},
        )
        said = f"loss is {verdict.loss} at step {step}, the norm of its gradient {verdict.norm}"
        self.run.log.info(f"warning: step skipped: {said}; its images are listed in bad-batches.jsonl")
        if bad.in_a_row + 1 >= self.run.trainer.max_bad_steps:
            self.ending = True
            self.stop_reason = f"{said}, bad step {bad.in_a_row + 1} in a row: try a lower --optim.lr and another --out"

    def _after_step(self, progress: StepProgress) -> None:
        """Evaluation, logs, topology and checkpoints, each when due and all at the end.

        The evaluation comes first: should it fail, the step is saved, and the run that goes on logs it.
        """
        trainer, state, done, last = self.run.trainer, self.state, self.state.done, self.state.done == self.stop
        if fate := self.run.log.lost():
            self.stop_reason = f"{self.run.folder}: {fate} while the run was on; it ends at step {done}, unsaved"
        if last:
            state.masks.finish()
        epoch, within = divmod(done, self.plan.steps_per_epoch)
        where = {"step": done, "epoch": done / self.plan.steps_per_epoch}
        due = last or (within == 0 and epoch % trainer.evaluate_every_epochs == 0)
        metric = self.task.best_by if due else None
        if metric is not None:
            self._evaluate()
        logged = done % trainer.log_every_steps == 0 or last
        if logged:
            self.group.at(f"log of step {done}")
            self.unreadable.synchronize()
            self.group.agree(state.identity)
        at = f"epoch {min(epoch + 1, math.ceil(self.epochs))}/{self.epochs:g}"
        progress.advance(done, f"{at}, " + (f"loss {fmean(state.losses):.4f}" if state.losses else "no good step"))
        with self.whole:
            if logged:
                loss = {"loss": fmean(state.losses)} if state.losses else {}
                lr = learning_rate(self.optim, (done - 1) / self.plan.steps_per_epoch, self.epochs)
                bad = {"bad_steps": state.bad.total} if state.bad.total else {}
                rate = progress.images_per_second(done)
                self.run.log.write("metrics.jsonl", {**where, **loss, "lr": lr, "images_per_second": rate, **bad})
                state.losses.clear()
            if state.topology is not None and (within == 0 or done == self.total):
                self.run.log.write("topology.jsonl", {**where, **state.moved()})
            best = False
            if metric is not None:
                self.run.log.write("metrics.jsonl", {**where, **self.metrics})
                best = state.masks.reached and state.is_best(self.metrics[metric], self.task.higher_is_better)
            state.logged_through = done
        minutes, longest = (time.monotonic() - self.saved_at) / 60, trainer.save_every_minutes
        if last or best or (longest is not None and minutes >= longest) or done % trainer.save_every_steps == 0:
            self._save()

    def _lose_patience(self) -> None:
        """End the run here if trainer.patience says so: by what a checkpoint holds, so that a resumed run does, too."""
        trainer, state, per_epoch = self.run.trainer, self.state, self.plan.steps_per_epoch
        if trainer.patience is None or state.best is None or self.ending or state.done >= self.stop:
            return
        if state.logged_through - state.best["step"] >= trainer.patience * trainer.evaluate_every_epochs * per_epoch:
            self.run.log.info(
                f"ended at epoch {state.done / per_epoch:g} by trainer.patience {trainer.patience}: no evaluation was "
                f"better than that of epoch {state.best['step'] / per_epoch:g}"
            )
            self.stop = state.done
            state.masks.finish()
            if self.saver.step != state.done:
                self._save()

    def _evaluate(self) -> None:
        """Metrics of what would be written now: the average's where there is one, and the model's as ``raw_`` then."""
        if self.task.best_by is None:
            return
        self.metrics = self._metrics_of(self.model)
        if self.state.average is not None:
            average = self.state.masks.sync_to(self.state.average.module)
            self.metrics = self._metrics_of(average) | {f"raw_{name}": value for name, value in self.metrics.items()}

    def _metrics_of(self, model: nn.Module) -> dict[str, float]:
        training = model.training
        model.eval()
        self.group.at(f"evaluation at step {self.state.done}")
        hook = model.register_forward_pre_hook(lambda *_: self.group.at())
        with hold_masks(model), torch.no_grad():
            metrics = self.task.evaluate(self.fabric, model)
        hook.remove()
        model.train(training)
        return metrics

    def _save(self) -> None:
        """Begin to write a checkpoint; only the first process does."""
        self.group.at(f"saving of step {self.state.done}")
        self.saved_at = time.monotonic()
        if self.fabric.is_global_zero and not self.run.log.lost():
            self._write()

    def _write(self) -> None:
        best = self.state.best
        self.saver.save(
            self.state.done, *self.state.to_save(self.subject.card), best=int(best["step"]) if best else None
        )

    def _rescue(self, saves: bool) -> str:
        """Save the last whole step, in whatever process and thread is left to do it; says which checkpoint is the last.

        Its own errors do not count.
        """
        if self.run.log.lost() or not self.run.checkpoints.is_dir():
            return ""
        with suppress(Exception):
            patience = 0 if threading.current_thread() is threading.main_thread() else 5.0  # who holds it is no other
            if saves and self.whole.acquire(timeout=patience):
                self.saver.wait()
                kept = checkpoint.list_checkpoints(self.run.checkpoints)
                stream = None
                if self.updated is not None:  # the usual one may be waiting for a collective
                    stream = torch.cuda.Stream(self.fabric.device)  # type: ignore[no-untyped-call]
                    stream.wait_event(self.updated)
                if self.state.done > (checkpoint.step_of(kept[-1]) if kept else 0):
                    with torch.cuda.stream(stream):
                        self._write()
                    self.saver.wait()
        with suppress(OSError):
            return f"; {checkpoint.last(self.run.checkpoints)}"
        return ""

    def _end(self) -> NoReturn:
        """Save and leave, all processes together; the first one says why, and gives the status."""
        unsaved = ""
        try:
            if self.state.done != self.saver.step or self.saver.failed:
                self._save()
            self.saver.wait()
        except ValueError as error:  # weights that are not finite
            unsaved = f"; not saved: {error}"
        reason, signal = self.stop_reason or self.saver.failure, self.signals.received
        for rank in range(self.fabric.world_size):
            theirs = self.fabric.broadcast((reason, signal), src=rank)
            reason, signal = reason or theirs[0], signal or theirs[1]
        if signal is None or unsaved or self.run.log.lost() or self.saver.failed:
            self.group.fail(ValueError(f"{reason or signal}{unsaved}"))
        if not self.fabric.is_global_zero:
            raise SystemExit(0)  # another status has launchers kill the first process
        last = checkpoint.last(self.run.checkpoints)
        self.run.log.info(f"ended by {signal} at step {self.state.done}; {last}; the same command goes on")
        raise SystemExit(signals.STOPPED_STATUS)
