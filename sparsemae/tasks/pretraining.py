"""Sparse pretraining: a masked autoencoder whose encoder is N:M sparse, its mask moving (stage 1)."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, ClassVar, NamedTuple, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from PIL import Image
from torch import Tensor, nn

from sparsemae.card import ModelCard
from sparsemae.costs.multiply_adds import Forward, count_forward
from sparsemae.data import draws
from sparsemae.data.dataset import ImageDataset
from sparsemae.data.jpeg import decoded_by
from sparsemae.data.sources import find_source
from sparsemae.data.splits import Part, Source
from sparsemae.data.transforms import denormalize, evaluation_transform, normalize, training_transform
from sparsemae.models import MaskedAutoencoder, build_vit, use_plain_attention
from sparsemae.models.mae import MAEOutput, patches_kept
from sparsemae.models.start import input_of, start_from
from sparsemae.options import PretrainConfig, SourceConfig
from sparsemae.sparsity import dense_weights
from sparsemae.tasks.outcomes import Gallery, Shown, beside
from sparsemae.tasks.task import Network, Task, blank_images, encoder_of, picture, smallest_side


class Pretraining(Task[PretrainConfig]):
    """Reconstruction of masked patches."""

    title: ClassVar[str] = "pretraining"
    around: ClassVar[str | None] = "decoder"
    freezes: ClassVar[bool] = False
    teacher: MaskedAutoencoder | None = None
    """Of a training: a plan or a benchmark has none."""
    said: Sequence[str] = ()
    """Of the teacher: what of it was taken, and its license."""

    def open_data(self) -> None:
        self.splits = find_source(self.config.data)
        self.source = self.splits.open("train", self.config.data.train_images)
        self.sources = {"train": self.source}

    def settle(self, config: PretrainConfig) -> None:
        super().settle(config)
        if config.teacher is not None:
            self.teacher = self._open_teacher(config.teacher)

    def _open_teacher(self, source: str) -> MaskedAutoencoder:
        card, teacher = self.card(), self.build(self.card())
        start = start_from(teacher, source)
        self.said = [f"teacher {source}: {start}"]
        theirs, kind = input_of(source)
        if kind == "sparse":
            raise ValueError(f"--teacher {source}: wanted a dense network, got one with N:M sparse layers")
        if theirs is not None and (theirs.mean, theirs.std) != (card.input.mean, card.input.std):
            raise ValueError(
                f"--teacher {source}: wanted images of mean {card.input.mean} and std {card.input.std}, "
                f"got {theirs.mean} and {theirs.std}"
            )
        return teacher.eval().requires_grad_(False)

    def notes(self, model: nn.Module) -> list[str]:
        return [*self.said, *super().notes(model)]

    def settings(self) -> dict[str, Any]:
        config = self.config
        return {
            "decoder": asdict(config.decoder), "mask_ratio": config.mask_ratio, "norm_pix_loss": config.norm_pix_loss
        }  # fmt: skip

    def datasets(self, model: nn.Module) -> tuple[ImageDataset, None]:
        data, patches = self.config.data, encoder_of(model).patch_embed.num_patches
        patches_kept(patches, self.config.mask_ratio)
        transform, smallest = training_transform(data), smallest_side(model)
        return ImageDataset(
            decoded_by(data.jpeg, self.source), transform, self.config.seed, patches, smallest, data,
            data.max_unreadable, data.cache_gigabytes,
        ), None  # fmt: skip

    def wrapped(self, model: nn.Module) -> nn.Module:
        assert isinstance(model, MaskedAutoencoder)
        return ConcurrentLoss(model, self.config.dense_loss_weight, self.teacher, self.config.teacher_weight)

    def loss(self, forward: nn.Module, batch: dict[str, Any]) -> Tensor:
        data = self.config.data
        loss: Tensor = forward(normalize(batch["image"], data.mean, data.std), self.config.mask_ratio, batch["noise"])
        return loss

    def example_batch(self, model: nn.Module, size: int) -> dict[str, Any]:
        noise = torch.rand(size, encoder_of(model).patch_embed.num_patches)
        return {"image": blank_images(size, self.config.data.img_size), "noise": noise}

    def forwards(self, model: nn.Module) -> list[Forward]:
        assert isinstance(model, MaskedAutoencoder)
        use_plain_attention(model)  # matrix products, each of which the counter knows
        encoder, ratio = model.eval().encoder, self.config.mask_ratio
        patches = encoder.patch_embed.num_patches
        tokens = patches + encoder.num_prefix_tokens
        image = torch.empty(1, encoder.in_chans, *encoder.patch_embed.img_size, device="meta")
        noise = torch.empty(1, patches, device="meta")
        latent, _, ids_restore = model.forward_encoder(image, ratio, noise)
        count = partial(count_forward, model=model)
        return [
            count("the encoder", latent.shape[1], forward=lambda: model.forward_encoder(image, ratio, noise)),
            count("the decoder", tokens, forward=lambda: model.forward_decoder(latent, ids_restore)),
            count("the encoder afterwards", tokens, forward=lambda: encoder.forward_features(image)),
        ]

    def galleries(self, model: nn.Module) -> list[Gallery]:
        assert self.splits is not None
        assert isinstance(model, MaskedAutoencoder)
        try:
            source, which = self.splits.open("val"), "Images that it was not trained on"
        except ValueError:
            source, which = self.source, "Training images"
        shown = reconstruct(model, self.card(), source, self.config.seed)
        about = f"{which}: as they are, {', '.join(list(shown.images)[1:])}. {shown.about}."
        rows = zip(*([picture(pixels) for pixels in images] for images in shown.images.values()), strict=True)
        pictures = [Shown(beside(row), file) for row, file in zip(rows, shown.files, strict=True)]
        return [Gallery("Reconstructions", about, pictures)]

    def result(self, metrics: dict[str, float]) -> str:
        return f"the full latent weights, to start finetuning from (--init {self.config.out})"

    @classmethod
    def build(cls, card: ModelCard, drop_path: float = 0.0) -> MaskedAutoencoder:
        encoder = build_vit(card.architecture, card.model_args, card.input.img_size, drop_path=drop_path)
        decoder = card.settings["decoder"]
        return MaskedAutoencoder(
            encoder, decoder["embed_dim"], decoder["depth"], decoder["num_heads"], card.settings["norm_pix_loss"]
        )

    @classmethod
    def evaluation_set(cls, card: ModelCard, data: SourceConfig, smallest: int, split: Part | None = None) -> NoReturn:
        raise ValueError("wanted a finetuned model, got a pretrained one (--probe knn or linear looks at its encoder)")

    @classmethod
    def measure(
        cls, fabric: Fabric, network: Network, card: ModelCard, dataset: ImageDataset, workers: int,
        progress: bool = False,
    ) -> NoReturn:  # fmt: skip
        raise NotImplementedError

    @classmethod
    def predict(cls, network: Network, card: ModelCard, images: Sequence[Image.Image], top_k: int) -> NoReturn:
        raise ValueError("wanted a finetuned model, got a pretrained one, which has no classes")

    @classmethod
    def summary(cls, metrics: dict[str, float]) -> str:
        return ""


class Reconstructions(NamedTuple):
    """What an autoencoder makes of some images."""

    files: list[str]
    images: dict[str, Tensor]
    """By what was done to them, uint8 ``[B, 3, H, W]``: the originals first."""
    about: str
    """How much is masked, and the losses."""


def reconstruct(
    model: MaskedAutoencoder, card: ModelCard, source: Source, seed: int = 0, count: int = 8
) -> Reconstructions:
    """Images evenly from a source, masked, and reconstructed by the kept and by the full latent weights.

    Masked patches are shown as predicted, with the target's own mean and standard deviation given back when the model
    predicts normalized patches; kept patches are shown as they are.
    """
    spec, ratio, weight = card.input, card.settings["mask_ratio"], next(model.parameters())
    transform = evaluation_transform(spec)
    indices = np.linspace(0, len(source) - 1, min(count, len(source))).astype(int).tolist()
    pixels = torch.stack([transform(*source.read(index, rules=spec))[0] for index in indices]).to(weight.device)
    x = normalize(pixels, spec.mean, spec.std).to(weight.dtype)
    shape = len(x), model.encoder.patch_embed.num_patches
    noise = torch.from_numpy(draws.stream(seed, draws.PICTURE).random(shape, np.float32)).to(weight.device)
    with torch.inference_mode():
        sparse = model(x, ratio, noise)
        with dense_weights(model):
            full = model(x, ratio, noise)
        masked = model.unpatchify(sparse.mask[..., None].expand_as(sparse.pred)).bool()
        shown = {
            "masked": x.masked_fill(masked, 0.0),
            "by the kept weights": torch.where(masked, model.reconstruct(x, sparse), x),
            "by the full weights": torch.where(masked, model.reconstruct(x, full), x),
        }
    about = f"{ratio:.0%} of the patches are masked; loss {float(sparse.loss):.3f} kept, {float(full.loss):.3f} full"
    images = {title: denormalize(each, spec.mean, spec.std) for title, each in shown.items()}
    return Reconstructions([source.filename(index) for index in indices], {"original": pixels, **images}, about)


class ConcurrentLoss(nn.Module):
    """The loss of the sparse network plus that of the full one, on the same images and the same masked patches.

    Both passes lie inside one forward, so that DDP sees one: ``loss(M * W) + weight * loss(W)``, the weights shared.
    A teacher adds ``teacher_weight * feature_loss``.
    """

    def __init__(
        self,
        model: MaskedAutoencoder,
        weight: float,
        teacher: MaskedAutoencoder | None = None,
        teacher_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.model, self.weight, self.teacher, self.teacher_weight = model, weight, teacher, teacher_weight

    def forward(self, images: Tensor, mask_ratio: float, noise: Tensor) -> Tensor:
        """``images [B, 3, H, W]``, ``noise [B, L]`` to a scalar."""
        output: MAEOutput = self.model(images, mask_ratio, noise)
        loss = output.loss
        if self.teacher is not None:
            with torch.no_grad():
                wanted, _, _ = self.teacher.forward_encoder(images, mask_ratio, noise)
            loss = loss + self.teacher_weight * feature_loss(output.latent, wanted)
        if self.weight:
            with dense_weights(self.model):
                loss = loss + self.weight * self.model(images, mask_ratio, noise).loss
        return loss


def feature_loss(latent: Tensor, wanted: Tensor) -> Tensor:
    """Smooth L1, beta 2, to the teacher's tokens, each normalized (G2SD, arXiv 2302.14771), at least in fp32.

    Args:
        latent: the student's tokens, ``[B, 1 + kept, D]``.
        wanted: the teacher's, of the same patches.
    """
    latent, wanted = (tokens.to(torch.promote_types(tokens.dtype, torch.float32)) for tokens in (latent, wanted))
    return F.smooth_l1_loss(latent, F.layer_norm(wanted, wanted.shape[-1:], eps=1e-6), beta=2.0)
