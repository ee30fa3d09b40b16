"""The optimizer, the devices, and a run's bookkeeping."""

from dataclasses import dataclass
from typing import Literal

from sparsemae.limits import ABOVE_0, AT_LEAST_0, AT_LEAST_1, BELOW_1, UNIT_INTERVAL, UP_TO_1, check_limits, may_change


@dataclass
class OptimConfig:
    """AdamW and its schedule. The defaults are Table 1's."""

    lr: float = 2.4e-3
    """Peak learning rate, for the global batch as it is (no hidden scaling)."""
    lr_batch: int | None = None
    """The global batch, in images, that lr and min_lr are given for; only trainer.scale_lr uses it."""
    min_lr: float = 1e-5
    """Learning rate at the end of the schedule."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """How the learning rate falls from its peak to min_lr."""
    warmup_epochs: float = 5.0
    """Epochs of linear warm-up."""
    warmup_steps: int | None = None
    """Length of the warm-up in optimizer steps instead of epochs."""
    warmup_start: float = 0.0
    """Learning rate at which the warm-up begins, as a fraction of the peak."""
    weight_decay: float = 0.05
    """Decoupled weight decay; biases, norms, position embeddings, class and mask tokens take none."""
    layer_decay: float = 1.0
    """Learning-rate factor per layer from the head down; 1 switches it off."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's beta."""
    eps: float = 1e-8
    """Adam's epsilon."""
    clip_grad: float | None = None
    """Largest norm of the gradient; None: no clipping."""

    def __post_init__(self) -> None:
        rates = {"lr": AT_LEAST_0, "lr_batch": ABOVE_0, "min_lr": AT_LEAST_0, "warmup_start": UNIT_INTERVAL}
        warmup = {"warmup_epochs": AT_LEAST_0, "warmup_steps": AT_LEAST_0}
        adam = {"weight_decay": AT_LEAST_0, "betas": BELOW_1, "eps": ABOVE_0, "clip_grad": ABOVE_0}
        check_limits(self, "optim.", layer_decay=UP_TO_1, **rates, **warmup, **adam)


@dataclass
class TrainerConfig:
    """Devices, batches and the run's bookkeeping."""

    epochs: float = 400.0
    """Length of the schedule, epochs."""
    steps: int | None = None
    """Length of the schedule in optimizer steps instead of epochs."""
    max_steps: int | None = may_change(None)
    """Stop after this many optimizer steps, the schedule unchanged; None: run to its end."""
    global_batch: int = 4096
    """Images per optimizer step, over all devices and accumulation: what a recipe fixes."""
    device_batch: int | None = None
    """Images per device and forward; accumulation fills the global batch. None: global_batch / devices, and in a run
    that is continued what it was, on any number of devices."""
    scale_lr: bool = False
    """Scale optim.lr by global_batch / optim.lr_batch (the linear rule)."""
    devices: int = may_change(1)
    """Processes per machine, one device each."""
    num_nodes: int = may_change(1)
    """Machines."""
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = may_change("auto")
    """Where to run."""
    precision: str = "auto"
    """bf16 (autocast), fp32, fp64 (for tests), or auto: bf16 where the device multiplies it, else fp32."""
    compile: bool | Literal["auto"] = may_change("auto")
    """torch.compile the training forward; auto: on CUDA only. Evaluation stays eager."""
    ema_decay: float | None = None
    """Per optimizer step, of a moving average of the latent weights, which is then what is evaluated and written;
    None: no average."""
    log_every_steps: int = may_change(10)
    """Optimizer steps between lines of metrics.jsonl."""
    save_every_steps: int = may_change(1000)
    """Optimizer steps between checkpoints; one is always written at the end."""
    save_every_minutes: float | None = may_change(None)
    """Minutes after which a checkpoint is written in between; None: by steps only."""
    keep_checkpoints: int = may_change(2)
    """Number of latest checkpoints kept, besides the best one."""
    max_failed_saves: int = may_change(3)
    """Stop when this many checkpoints in a row could not be written (a full disk)."""
    max_bad_steps: int = may_change(5)
    """Stop when this many optimizer steps in a row had a loss or gradient that is not finite; each is skipped."""
    loader_timeout_seconds: float = may_change(600.0)
    """Seconds without a batch after which loader processes count as hung."""
    loader_retries: int = may_change(6)
    """Times that a loader that died, hung or lost its source is started again, after 1, 2, 4, ... seconds."""
    evaluate_every_epochs: int = may_change(1)
    """Epochs between evaluations, where the task has one; the end is always evaluated."""
    resume: Literal["auto", "never", "anyway"] = may_change("auto")
    """auto: a run folder that holds a checkpoint continues from the last one; anyway: even where settings differ;
    never: refuse such a folder."""

    def __post_init__(self) -> None:
        counts = (
            "steps", "max_steps", "global_batch", "device_batch", "devices", "num_nodes", "log_every_steps",
            "save_every_steps", "keep_checkpoints", "max_failed_saves", "max_bad_steps", "evaluate_every_epochs",
        )  # fmt: skip
        times = dict.fromkeys(("epochs", "save_every_minutes", "loader_timeout_seconds"), ABOVE_0)
        check_limits(
            self, "trainer.", **dict.fromkeys(counts, AT_LEAST_1), **times, loader_retries=AT_LEAST_0, ema_decay=BELOW_1
        )

    def schedule_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps from the start of the schedule to its end."""
        return self.steps or round(self.epochs * steps_per_epoch)
