"""The options of the jobs that train: what all have, and each task's own. The defaults are the paper's tables."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from sparsemae.limits import ABOVE_0, AT_LEAST_0, BELOW_1, UNIT_INTERVAL, UP_TO_1, Options, option
from sparsemae.options.data import DataConfig, ImageDataConfig, MaskDataConfig
from sparsemae.options.model import DEFAULT_MODEL, DecoderConfig, HeadConfig, InferenceConfig, ModelConfig, SparseConfig
from sparsemae.options.training import LOGGERS, OptimConfig, TrainerConfig


def _is_online(source: str | None) -> bool:
    return (source or "").startswith(("timm:", "hf-hub:", "auto"))


@dataclass
class TrainingConfig(Options):
    """What every training takes."""

    task: ClassVar[str]
    """Which entry of `sparsemae.tasks.TASKS` these are the options of."""

    out: str = option("runs/train", may_change=True)
    """The run's folder."""
    seed: int = option(0, AT_LEAST_0)
    """Seed of everything random."""
    log: str | None = option(None, may_change=True)
    """Where the lines of metrics.jsonl go besides, comma-separated: tensorboard, csv, wandb."""
    init: str | None = option(None, must_exist=lambda config: not _is_online(config.init))
    """Weights to start from: a run folder, a file (MAE, timm, HF ViTMAE, our own), timm:NAME, hf-hub:OWNER/NAME, or
    auto: timm's for the chosen model; None: from scratch."""
    model: ModelConfig = field(default_factory=ModelConfig)
    sparse: SparseConfig = field(default_factory=SparseConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    from_data: list[str] = field(default_factory=list, metadata={"may_change": True})
    """Options, by their dotted names, that follow from the data; without a recipe all that are not named and can."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := {*self.loggers} - {*LOGGERS}:
            raise ValueError(f"log: wanted some of {', '.join(LOGGERS)}, got {', '.join(sorted(unknown))}")
        if self.init is None and self.model.name is None:
            self.model.name = DEFAULT_MODEL
        if self.init is None and self.sparse.allocation != "uniform" and not self.sparse.allocation_epoch:
            raise ValueError(
                "sparse.allocation_epoch: wanted more than 0 without weights to start from (--init), got 0"
            )

    @property
    def loggers(self) -> list[str]:
        """What `log` names, each once."""
        return list(dict.fromkeys(name.strip() for name in (self.log or "").split(",") if name.strip()))


@dataclass
class PretrainConfig(TrainingConfig):
    """Sparse pretraining (Table 1)."""

    task: ClassVar[str] = "pretrain"

    out: str = option("runs/pretrain", may_change=True)
    """The run's folder."""
    mask_ratio: float = option(0.25, UNIT_INTERVAL)
    """Fraction of the patches that is masked."""
    norm_pix_loss: bool = True
    """Normalize each target patch by its own mean and variance."""
    dense_loss_weight: float = option(0.0, AT_LEAST_0)
    """Weight w of the full transformer's own loss, trained concurrently: loss(sparse) + w * loss(full), twice the cost;
    0: the sparse network alone."""
    teacher: str | None = option(None, must_exist=lambda config: not _is_online(config.teacher))
    """A dense MAE of the same network, as init takes it: the encoder learns its features of the visible patches too,
    without a projector (G2SD's loss, arXiv 2302.14771); None: pixels alone. A plan does not count it."""
    teacher_weight: float = option(1.0, ABOVE_0)
    """Weight of the features' loss; that of the pixels' is 1."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    data: ImageDataConfig = field(default_factory=ImageDataConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dense_loss_weight and self.sparse.pattern == "dense":
            raise ValueError(f"dense_loss_weight: wanted 0 with sparse.pattern=dense, got {self.dense_loss_weight:g}")


@dataclass
class FinetuneConfig(TrainingConfig):
    """Sparse finetuning for classification (Table 2)."""

    task: ClassVar[str] = "classify"

    out: str = option("runs/finetune", may_change=True)
    """The run's folder."""
    label_smoothing: float = option(0.1, BELOW_1)
    """Label smoothing epsilon."""
    mixup: float = option(0.8, AT_LEAST_0, from_data=True)
    """Alpha of mixup; 0 switches it off."""
    cutmix: float = option(1.0, AT_LEAST_0, from_data=True)
    """Alpha of cutmix; 0 switches it off. With both, each batch takes one of them, with probability 0.5."""
    erasing: float = option(0.25, UNIT_INTERVAL, from_data=True)
    """Probability of erasing a random rectangle of an image with noise."""
    class_weights: Literal["none", "balanced"] = "none"
    """Weight of each image in the loss; balanced: inverse to its class's images, 1 in the mean over them."""
    teacher: str | None = option(None, must_exist=lambda config: not _is_online(config.teacher))
    """A trained classifier to learn from: a run folder of the same classes, or timm:NAME of as many. It sees the mixed
    images (DeiT, G2SD; arXiv 2012.12877, 2302.14771); None: labels alone. A plan does not count it."""
    teacher_weight: float = option(0.5, UP_TO_1)
    """Share of the teacher in the loss; the labels have the rest."""
    teacher_temperature: float = option(1.0, ABOVE_0)
    """What both logits are divided by before they are compared; DeiT's is 3."""
    data: ImageDataConfig = field(
        default_factory=lambda: ImageDataConfig(crop_scale=(0.08, 1.0), auto_augment="rand-m9-mstd0.5-inc1")
    )
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=5e-3, min_lr=1e-6, layer_decay=0.65))
    trainer: TrainerConfig = field(default_factory=lambda: TrainerConfig(epochs=200, global_batch=2048))


@dataclass
class SegmentConfig(TrainingConfig):
    """Sparse finetuning for semantic segmentation (Table 3)."""

    task: ClassVar[str] = "segment"

    out: str = option("runs/segment", may_change=True)
    """The run's folder."""
    out_indices: list[int] = field(default_factory=lambda: [3, 5, 7, 11])
    """Four blocks after which the ViT is read, counted from 0; the last must be its last."""
    head: HeadConfig = field(default_factory=HeadConfig)
    data: MaskDataConfig = field(default_factory=MaskDataConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            lr=1e-4, min_lr=0.0, schedule="linear", warmup_steps=1500, warmup_start=1e-6, layer_decay=0.75
        )
    )
    trainer: TrainerConfig = field(default_factory=lambda: TrainerConfig(steps=160_000, global_batch=16))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.inference = self.inference.of_window(self.data.img_size)
