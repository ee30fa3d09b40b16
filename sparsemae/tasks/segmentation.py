"""Sparse finetuning for semantic segmentation: the mask keeps moving, then it is frozen (stage 2).

Predictions are compared with the masks at the images' own size. All scores come from one confusion matrix, summed over
all images and processes.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from lightning_fabric import Fabric
from PIL import Image
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix
from torchvision.transforms.v2 import functional as transforms

from sparsemae.card import InputSpec, ModelCard
from sparsemae.costs.multiply_adds import Forward, count_forward
from sparsemae.data import loader, mask_transforms, masks, pairs, sampling
from sparsemae.data.dataset import ImageDataset
from sparsemae.data.splits import Part
from sparsemae.data.survey import survey
from sparsemae.data.transforms import normalize
from sparsemae.models import build_vit, use_plain_attention
from sparsemae.models.segmenter import Segmenter, segmentation_loss
from sparsemae.options import HeadConfig, InferenceConfig, SegmentConfig, SourceConfig
from sparsemae.predictor import require_finite
from sparsemae.tasks.outcomes import PixelOutcomes, Shown
from sparsemae.tasks.sliding_window import predict_scores, resized
from sparsemae.tasks.sparse import meta_model
from sparsemae.tasks.task import Network, Task, blank_images, picture
from sparsemae.training.logs import with_progress

PER_CLASS = "iou/"
"""Before a class's name, in the metrics."""
PIXELS_AT_ONCE = 512 * 512
"""As the network sees them: small images of one size are evaluated together, one that has more by itself."""


class Segmentation(Task[SegmentConfig]):
    """One class for each pixel."""

    title: ClassVar[str] = "segmentation"
    around: ClassVar[str | None] = "heads"
    best_by: ClassVar[str | None] = "miou"
    dataset_size: ClassVar[tuple[int, int]] = (20_210, 150)
    embedded_classes: ClassVar[int] = 11
    at_once: ClassVar[int] = 1

    def __init__(self, config: SegmentConfig) -> None:
        super().__init__(config)
        self.legend, self.absent = masks.Legend([]), list[str]()

    def open_data(self) -> None:
        data = self.config.data
        self.splits = pairs.find_masks(data)
        self.train, self.val = (
            pairs.open_pairs(self.splits, "train", data.train_images),
            pairs.open_pairs(self.splits, "val"),
        )
        self.sources = {"train": self.train, "val": self.val}
        assert self.train.legend is not None
        for source in self.sources.values():
            survey(source, data)
        pairs.refuse_binary(self.train)
        self.class_names, self.legend = self.train.class_names, self.train.legend

    @cached_property
    def trained_on(self) -> dict[str, Any]:
        found = super().trained_on
        return found | {"ignore_label": self.legend.ignore_label} if found else found

    def settings(self) -> dict[str, Any]:
        config, legend = self.config, self.legend
        return {
            "head": asdict(config.head), "out_indices": config.out_indices, "inference": asdict(config.inference),
            "palette": legend.palette, "reduce_zero_label": legend.reduce_zero_label,
        }  # fmt: skip

    def datasets(self, model: nn.Module) -> tuple[ImageDataset, ImageDataset]:
        data = self.config.data
        evaluation, cache = mask_transforms.mask_evaluation_transform, data.cache_gigabytes
        self.validation = ImageDataset(self.val, evaluation, rules=data, cache_gigabytes=cache)
        return ImageDataset(
            self.train, mask_transforms.mask_training_transform(data), self.config.seed, rules=data,
            max_unreadable=data.max_unreadable, cache_gigabytes=cache,
        ), self.validation  # fmt: skip

    def prepare(self, model: nn.Module, fabric: Fabric, batches: sampling.BatchPlan) -> None:
        if batches.micro_batch < 2 and self.config.head.kind == "upernet":
            raise ValueError(
                "trainer.device_batch: wanted at least 2 images per device and forward, got 1: the head pools to "
                "1 x 1, where batch normalization has nothing to normalize over in a single image"
            )
        if fabric.device.type == "cuda":
            if self.config.trainer.deterministic:
                raise ValueError("trainer.deterministic: on CUDA, a segmenter's pooling and loss are not: wanted false")
            if fabric.world_size > 1:  # torch has none for CPUs
                nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as tensor cores want them
            torch.backends.cudnn.benchmark = self.config.inference.mode == "slide"  # each size is tried anew

    def notes(self, model: nn.Module) -> list[str]:
        """A warning where masks seem to be of another kind, and what the head costs."""
        side, said = self.config.data.img_size, pairs.said_of_classes(self.train)
        around = ", ".join(
            f"{sum(parameter.numel() for parameter in part.parameters()):,} {name}"
            for name, part in model.named_children()
            if name != "encoder"
        )
        encoder, head = (forward.total for forward in self.forwards(meta_model(self)))
        wide = f"{self.config.head.width} wide"
        named = {"upernet": f"UperNet {wide}", "segformer": f"SegFormer head {wide}", "linear": "linear head"}
        cost = (
            f"{named[self.config.head.kind]}: {around} parameters, dense; multiply-adds per {side} px image: "
            f"{(encoder.kept + head.kept) / 1e9:.1f} G with the kept weights, {(encoder.dense + head.dense) / 1e9:.1f} "
            f"G with all, of both {head.dense / 1e9:.1f} G in the head"
        )
        return [*super().notes(model), *said, cost]

    def loss(self, forward: nn.Module, batch: dict[str, Any]) -> Tensor:
        data = self.config.data
        output = forward(normalize(batch["image"], data.mean, data.std))
        return segmentation_loss(output, batch["target"], self.config.head.auxiliary_weight, masks.IGNORED)

    def seen(self, batch: dict[str, Any]) -> list[Shown]:
        return [
            Shown(masks.overlaid(picture(pixels), classes.cpu().numpy(), self.legend.palette), "")
            for pixels, classes in zip(batch["image"], batch["target"], strict=True)
        ]

    def example_batch(self, model: nn.Module, size: int) -> dict[str, Any]:
        images = blank_images(size, self.config.data.img_size)
        return {"image": images, "target": torch.zeros_like(images[:, 0])}

    def forwards(self, model: nn.Module) -> list[Forward]:
        assert isinstance(model, Segmenter)
        use_plain_attention(model)  # matrix products, each of which the counter knows
        embed = model.eval().encoder.patch_embed
        image = torch.empty(1, model.encoder.in_chans, *embed.img_size, device="meta")
        tokens = embed.num_patches + model.encoder.num_prefix_tokens
        maps = [x.detach() for x in model.forward_maps(image)]
        what = "encoder" if model.pyramid is None else "encoder and pyramid"
        return [
            count_forward(what, tokens, model, lambda: model.forward_maps(image)),
            count_forward("the head", tokens, model, lambda: model.decode_head(maps)),
        ]

    def evaluate(self, fabric: Fabric, model: nn.Module) -> dict[str, float]:
        self.outcomes = PixelOutcomes(self.validation, self.class_names, self.legend.palette)
        measured = self.measure(
            fabric, model, self.card(), self.validation, self.config.data.workers, outcomes=self.outcomes
        )
        self.absent = [name for name in self.class_names if math.isnan(measured[PER_CLASS + name])]
        return {name: value for name, value in measured.items() if not name.startswith(PER_CLASS)}

    def result(self, metrics: dict[str, float]) -> str:
        absent = f" (in none of their masks: {', '.join(self.absent)})" if self.absent else ""
        return f"{self.summary(metrics)} on {len(self.validation):,} images{absent}"

    @classmethod
    def build(cls, card: ModelCard, drop_path: float = 0.0) -> Segmenter:
        args = {**card.model_args, "dynamic_img_size": True, "dynamic_img_pad": True}
        encoder = build_vit(card.architecture, args, card.input.img_size, drop_path=drop_path)
        head, out_indices = HeadConfig(**card.settings["head"]), card.settings["out_indices"]
        return Segmenter(encoder, len(card.class_names), out_indices, head)

    @classmethod
    def evaluation_set(
        cls, card: ModelCard, data: SourceConfig, smallest: int, split: Part | None = None
    ) -> tuple[ImageDataset, str]:
        names = ("reduce_zero_label", "ignore_label")  # cards of before have the first alone
        trained = {name: value for name, value in (card.settings | card.data).items() if name in names}
        splits = pairs.find_masks(data, trained)
        source, said = splits.open_for_evaluation(split, card.data, card.class_names)
        pairs.check_pairs(splits, source)
        if tuple(source.class_names) != card.class_names:
            raise ValueError(
                f"{splits.root}: wanted the {len(card.class_names)} classes of the model "
                f"({', '.join(card.class_names[:3])}, ...), got {len(source.class_names)} "
                f"({', '.join(source.class_names[:3])}, ...)"
                + " (--data.source and --data.root name others)"
                * (data.root is None)
            )
        rules = replace(card.input, exif=card.input.exif if data.exif is None else data.exif)
        return ImageDataset(source, mask_transforms.mask_evaluation_transform, rules=rules), said

    @classmethod
    def measure(
        cls, fabric: Fabric, network: Network, card: ModelCard, dataset: ImageDataset, workers: int,
        progress: bool = False, outcomes: PixelOutcomes | None = None,
    ) -> dict[str, float]:  # fmt: skip
        """mIoU, mean and pixel accuracy, and ``iou/CLASS`` for each class (nan: in no mask).

        Raises ValueError, on all processes, if there is no labeled pixel or a logit is not finite.
        """
        names, inference = card.class_names, InferenceConfig(**card.settings["inference"])
        finite = torch.ones((), device=fabric.device)
        meter = MulticlassConfusionMatrix(len(names), ignore_index=masks.IGNORED).to(fabric.device)
        sampler = sampling.EvaluationSampler(len(dataset), 1, fabric.global_rank, fabric.world_size)

        def logits(images: Tensor) -> Any:
            with fabric.autocast():
                return network(images).logits

        unreadable = loader.UnreadableImages(len(dataset), 0.0, at_end=True)
        found = of_one_size(loader.batches(dataset, sampler, workers, unreadable=unreadable), card.input, inference)
        for batch in with_progress(found, "evaluating", len(dataset)) if progress else found:
            images, targets = fabric.to_device((batch["image"], batch["target"]))
            summed = predict_scores(logits, images, card.input, inference)
            finite *= summed.isfinite().all()
            predicted = summed.argmax(dim=1)
            meter.update(predicted, targets.long())
            if outcomes is not None:
                outcomes.add(batch["index"], batch["image"], batch["target"], predicted)
        unreadable.synchronize()
        require_finite(fabric.all_reduce(finite, reduce_op="mean") == 1)
        confusion = meter.compute()
        if not confusion.sum():
            name = dataset.source.filename(0)
            raise ValueError(f"{name}, ...: wanted labeled pixels to evaluate on, got ignored ones only")
        means, ious = scores(confusion)
        return means | {PER_CLASS + name: iou for name, iou in zip(names, ious, strict=True)}

    @classmethod
    def predict(cls, network: Network, card: ModelCard, images: Sequence[Image.Image], top_k: int) -> list[Any]:
        """For each image its classes uint8 ``[H, W]``, at its own size."""
        inference = InferenceConfig(**card.settings["inference"])
        found = (
            predict_scores(lambda x: network(x).logits, pixels[None], card.input, inference)
            for pixels in map(transforms.pil_to_tensor, images)
        )
        classes = []
        for scores_of_one in found:
            require_finite(scores_of_one.isfinite().all())
            classes.append(scores_of_one[0].argmax(dim=0).to("cpu", torch.uint8).numpy())
        return classes

    @classmethod
    def summary(cls, metrics: dict[str, float]) -> str:
        return (
            f"mIoU {metrics['miou']:.2%} over {metrics['scored_classes']:g} of {metrics['classes']:g} "
            f"classes, mean accuracy {metrics['mean_accuracy']:.2%}, "
            f"pixel accuracy {metrics['pixel_accuracy']:.2%}"
        )

    @classmethod
    def details(cls, card: ModelCard, metrics: dict[str, float]) -> list[str]:
        width = max(map(len, card.class_names))
        ious = {name: metrics[PER_CLASS + name] for name in card.class_names}
        return [f"  {name:<{width}} {'absent' if math.isnan(x) else f'{x:.2%}':>7}" for name, x in ious.items()]

    @classmethod
    def conditions(cls, card: ModelCard) -> str:
        inference = {**card.settings["inference"]}
        if inference["mode"] == "whole":
            del inference["stride"]
        return ", ".join(f"{name} {value}" for name, value in inference.items())


def of_one_size(
    single: Iterable[dict[str, Tensor]], spec: InputSpec, inference: InferenceConfig
) -> Iterator[dict[str, Tensor]]:
    """Batches of one image each, in their order; those that follow on one of the same size go with it, while small."""

    def pixels(height: int, width: int) -> int:
        seen_height, seen_width = resized(height, width, spec, max(inference.scales))
        return max(height * width, seen_height * seen_width)

    for size, same in itertools.groupby(single, lambda batch: batch["image"].shape[-2:]):
        while together := list(itertools.islice(same, max(1, PIXELS_AT_ONCE // pixels(*size)))):
            yield {key: torch.cat([batch[key] for batch in together]) for key in together[0]}


def scores(confusion: Tensor) -> tuple[dict[str, float], list[float]]:
    """mIoU, mean and pixel accuracy as fractions, and each class's IoU, of a matrix ``[C, C]`` of pixels.

    Rows are the truth, columns the prediction. Classes without a labeled pixel are nan, and left out of the means;
    ``scored_classes`` says how many are left, of ``classes``.
    """
    confusion = confusion.double()
    right, truth, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    recall = right / truth  # 0 / 0 is nan
    iou = torch.where(truth > 0, right / (truth + predicted - right), torch.nan)
    means: dict[str, Any] = {
        "miou": iou.nanmean(), "mean_accuracy": recall.nanmean(), "pixel_accuracy": right.sum() / truth.sum(),
        "scored_classes": (truth > 0).sum(), "classes": len(truth),
    }  # fmt: skip
    return {name: float(mean) for name, mean in means.items()}, iou.tolist()
