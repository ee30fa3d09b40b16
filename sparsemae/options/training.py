"""The optimizer, the devices, and a run's bookkeeping."""

from dataclasses import dataclass
from typing import Literal

from sparsemae.limits import (
    ABOVE_0,
    AT_LEAST_0,
    AT_LEAST_1,
    BELOW_1,
    MOST_PROCESSES,
    UNIT_INTERVAL,
    UP_TO_1,
    Options,
    option,
)  # fmt: skip

LOGGERS = ("tensorboard", "csv", "wandb")
"""What `TrainingConfig.log` may name."""


@dataclass
class OptimConfig(Options):
    """AdamW and its schedule. The defaults are Table 1's."""

    prefix = "optim."

    lr: float = option(2.4e-3, AT_LEAST_0, from_data=True)
    """Peak learning rate, for the global batch as it is (no hidden scaling)."""
    lr_batch: int | None = option(None, ABOVE_0)
    """The global batch, in images, that lr and min_lr are given for; only trainer.scale_lr uses it."""
    min_lr: float = option(1e-5, AT_LEAST_0, from_data=True)
    """Learning rate at the end of the schedule."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """How the learning rate falls from its peak to min_lr."""
    warmup_epochs: float = option(5.0, AT_LEAST_0, from_data=True)
    """Epochs of linear warm-up."""
    warmup_steps: int | None = option(None, AT_LEAST_0, from_data=True)
    """Length of the warm-up in optimizer steps instead of epochs."""
    warmup_start: float = option(0.0, UNIT_INTERVAL)
    """Learning rate at which the warm-up begins, as a fraction of the peak."""
    weight_decay: float = option(0.05, AT_LEAST_0)
    """Decoupled weight decay; biases, norms, position embeddings, class and mask tokens take none."""
    layer_decay: float = option(1.0, UP_TO_1, from_data=True)
    """Learning-rate factor per layer from the head down; 1 switches it off."""
    betas: tuple[float, float] = option((0.9, 0.999), BELOW_1)
    """Adam's beta."""
    eps: float = option(1e-8, ABOVE_0)
    """Adam's epsilon."""
    freeze_variance_epoch: float | None = option(None, ABOVE_0)
    """Epoch from which AdamW's second moment stays as it is (STEP, arXiv 2302.01172: where sparse.dense_epochs end);
    None: it never does."""
    clip_grad: float | None = option(None, ABOVE_0)
    """Largest norm of the gradient; None: no clipping."""


@dataclass
class TrainerConfig(Options):
    """Devices, batches and the run's bookkeeping."""

    prefix = "trainer."

    epochs: float = option(400.0, ABOVE_0, from_data=True)
    """Length of the schedule, epochs."""
    steps: int | None = option(None, AT_LEAST_1, from_data=True)
    """Length of the schedule in optimizer steps instead of epochs."""
    max_steps: int | None = option(None, AT_LEAST_1, may_change=True)
    """Stop after this many optimizer steps, the schedule unchanged; None: run to its end."""
    global_batch: int = option(4096, AT_LEAST_1, from_data=True)
    """Images per optimizer step, over all devices and accumulation: what a recipe fixes."""
    device_batch: int | None = option(None, AT_LEAST_1)
    """Images per device and forward; accumulation fills the global batch. None: global_batch / devices, and in a run
    that is continued what it was, on any number of devices."""
    scale_lr: bool = False
    """Scale optim.lr by global_batch / optim.lr_batch (the linear rule)."""
    devices: int = option(1, (1, MOST_PROCESSES), may_change=True)
    """Processes per machine, one device each."""
    num_nodes: int = option(1, AT_LEAST_1, may_change=True)
    """Machines."""
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = option("auto", may_change=True)
    """Where to run."""
    precision: str = "auto"
    """bf16 (autocast), fp32, tf32 (fp32 that CUDA multiplies in TF32), fp64 (for tests), or auto: bf16 where the device
    multiplies it, else fp32."""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile the training forward; auto: on CUDA only. Evaluation stays eager. Compiled, drop path draws other
    numbers, so that a run keeps what it began with."""
    deterministic: bool = option(False, may_change=True)
    """On CUDA, only algorithms that give the same bits each time, slower; a CPU has no others."""
    ema_decay: float | None = option(None, BELOW_1)
    """Per optimizer step, of a moving average of the latent weights, which is then what is evaluated and written;
    None: no average."""
    log_every_steps: int = option(10, AT_LEAST_1, may_change=True)
    """Optimizer steps between lines of metrics.jsonl."""
    save_every_steps: int = option(1000, AT_LEAST_1, may_change=True)
    """Optimizer steps between checkpoints; one is always written at the end."""
    save_every_minutes: float | None = option(None, ABOVE_0, may_change=True)
    """Minutes after which a checkpoint is written in between; None: by steps only."""
    keep_checkpoints: int = option(2, AT_LEAST_1, may_change=True)
    """Number of latest checkpoints kept, besides the best one."""
    max_failed_saves: int = option(3, AT_LEAST_1, may_change=True)
    """Stop when this many checkpoints in a row could not be written (a full disk)."""
    max_bad_steps: int = option(5, AT_LEAST_1, may_change=True)
    """Stop when this many optimizer steps in a row had a loss or gradient that is not finite; each is skipped."""
    loader_timeout_seconds: float = option(600.0, ABOVE_0, may_change=True)
    """Seconds without a batch after which loader processes count as hung."""
    loader_retries: int = option(6, AT_LEAST_0, may_change=True)
    """Times that a loader that died, hung or lost its source is started again, after 1, 2, 4, ... seconds."""
    hang_timeout_seconds: float | None = option(None, ABOVE_0, may_change=True)
    """Seconds without progress in any of several processes after which all end; None: more than a loader's time-outs
    and retries can take."""
    keep: Literal["last", "best"] = option("last", may_change=True, from_data=True)
    """Which epoch's weights are written in the end, where the task has an evaluation; best: of those at which the mask
    had the whole pattern."""
    evaluate_every_epochs: int = option(1, AT_LEAST_1, may_change=True)
    """Epochs between evaluations, where the task has one; the end is always evaluated."""
    patience: int | None = option(None, AT_LEAST_1, may_change=True)
    """End the run after so many evaluations without one better than the best; None: go on to the schedule's end."""
    resume: Literal["auto", "never", "anyway"] = option("auto", may_change=True)
    """auto: a run folder that holds a checkpoint continues from the last one; anyway: even where settings differ;
    never: refuse such a folder."""

    def hang_timeout(self) -> float:
        """What hang_timeout_seconds comes to, None included."""
        longest = (2 * self.loader_timeout_seconds + 60) * (self.loader_retries + 1)  # the longest pause: 60
        return self.hang_timeout_seconds or longest

    def schedule_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps from the start of the schedule to its end."""
        return self.steps or round(self.epochs * steps_per_epoch)
