"""Sparse pretraining: a masked autoencoder whose encoder is N:M sparse, its mask moving (stage 1)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparsemae.data.classification import ImageDataset
from sparsemae.data.sampling import BatchPlan
from sparsemae.data.sources import open_source
from sparsemae.data.transforms import DataConfig, normalize, training_transform
from sparsemae.models import MaskedAutoencoder, ModelConfig
from sparsemae.models.mae import patches_kept
from sparsemae.models.start import start_from
from sparsemae.models.weights import save_model
from sparsemae.sparsity import dense_weights, summarize
from sparsemae.tasks.build import DecoderConfig, SparseConfig, build_autoencoder, describe, make_sparse, mask_schedule
from sparsemae.training.config import TrainerConfig
from sparsemae.training.fit import fit
from sparsemae.training.optim import OptimConfig
from sparsemae.training.run import start
from sparsemae.training.task import Task


@dataclass
class PretrainConfig:
    """Sparse pretraining (Table 1)."""

    out: str = "runs/pretrain"
    """The run's folder."""
    seed: int = 0
    """Seed of everything random."""
    init: str | None = None
    """Weights to start from: a run folder, a file (MAE, timm, HF ViTMAE, our own), or timm:NAME; None: from scratch."""
    mask_ratio: float = 0.25
    """Share of the patches that is removed."""
    norm_pix_loss: bool = True
    """Normalise each target patch by its own mean and variance."""
    dense_loss_weight: float = 0.0
    """Weight w of the full transformer's own loss, trained concurrently: loss(sparse) + w * loss(full), twice the cost;
    0: the sparse network alone."""
    model: ModelConfig = field(default_factory=ModelConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    sparse: SparseConfig = field(default_factory=SparseConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)


class ConcurrentLoss(nn.Module):
    """The loss of the sparse network plus that of the full one, on the same images and the same removed patches.

    Both passes lie inside one forward, so that DDP sees one: ``loss(M * W) + weight * loss(W)``, the weights shared.
    """

    def __init__(self, model: MaskedAutoencoder, weight: float) -> None:
        super().__init__()
        self.model, self.weight = model, weight

    def forward(self, images: Tensor, mask_ratio: float, noise: Tensor) -> Tensor:
        """``images [B, 3, H, W]``, ``noise [B, L]`` to a scalar."""
        loss: Tensor = self.model(images, mask_ratio, noise).loss
        if self.weight:
            with dense_weights(self.model):
                loss = loss + self.weight * self.model(images, mask_ratio, noise).loss
        return loss


def pretrain(config: PretrainConfig) -> Path:
    """Run (or continue) sparse pretraining; returns the file of the full latent weights."""
    data, sparse = config.data, config.sparse
    if config.dense_loss_weight < 0:
        raise ValueError(f"dense_loss_weight: wanted 0 or more, got {config.dense_loss_weight:g}")
    if config.dense_loss_weight and sparse.pattern == "dense":
        raise ValueError(f"dense_loss_weight: wanted 0 with sparse.pattern=dense, got {config.dense_loss_weight:g}")
    source = open_source(data, "train", data.train_images)
    model = build_autoencoder(config.model, config.decoder, data.img_size, config.seed)
    model.norm_pix_loss = config.norm_pix_loss
    patch_embed = model.encoder.patch_embed
    patches_kept(patch_embed.num_patches, config.mask_ratio)
    dataset = ImageDataset(
        source, training_transform(data), config.seed, patches=patch_embed.num_patches,
        smallest=max(patch_embed.patch_size), exif=data.exif, max_unreadable=data.max_unreadable,
    )  # fmt: skip

    run = start(config, config.trainer, config.out, config.seed)
    trainer = run.trainer  # device_batch resolved
    plan = BatchPlan.make(len(dataset), trainer.global_batch, trainer.device_batch, run.fabric.world_size)
    if config.init is not None:
        run.log.say(f"{config.init}: {start_from(model, config.init)}")
    make_sparse(model, sparse)
    run.log.say(str(summarize(model.encoder)))
    description = describe(
        "pretrain",
        model,
        config.model,
        data,
        decoder=asdict(config.decoder),
        mask_ratio=config.mask_ratio,
        norm_pix_loss=config.norm_pix_loss,
        ema_decay=trainer.ema_decay,
    )

    def loss_of(forward: nn.Module, batch: dict[str, Any]) -> Tensor:
        loss: Tensor = forward(normalize(batch["image"], data.mean, data.std), config.mask_ratio, batch["noise"])
        return loss

    task = Task(
        model, dataset, loss_of, description, "pretraining", workers=data.workers, max_unreadable=data.max_unreadable,
        filename=source.filename,
        srste_strength=sparse.strength, srste_decoupled=sparse.term == "decoupled",
        masks=mask_schedule(model, sparse, trainer, plan),
        forward=ConcurrentLoss(model, config.dense_loss_weight),
    )  # fmt: skip
    fit(run, task, config.optim)
    path = run.folder / "model.safetensors"
    if run.fabric.is_global_zero:
        save_model(path, model, description)
        run.log.say(f"wrote {path}: the full latent weights, to start finetuning from (--init {run.folder})")
    return path
