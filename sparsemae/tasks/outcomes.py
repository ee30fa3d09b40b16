"""What a model made of each image of an evaluation: rows for predictions.csv, figures with their errors, a confusion
matrix, and the images that are worth a look.

An evaluation hands in its batches as it goes; each process keeps its own until `Outcomes.gather`. Of an image only
numbers are kept, and of a few segmented ones small pictures: a gallery reads its files again.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sparsemae.data.dataset import ImageDataset
from sparsemae.data.masks import IGNORED, overlaid

SHOWN = 24
"""Images of a gallery."""
THUMBNAIL = 192
"""Longer side of its pictures, px."""
OVERLAYS = 6
"""Best and worst segmented images."""
OVERLAY_SIDE = 320
"""Longer side of an overlay, px."""
ALL_PROBABILITIES = 40
"""Up to so many classes an image's row has the probability of each; beyond, the five highest."""


class Shown(NamedTuple):
    """A picture for people."""

    image: Image.Image
    title: str
    """Its file, or its class."""
    note: str = ""


class Gallery(NamedTuple):
    """Pictures under one heading."""

    title: str
    about: str
    """What is seen, and in which order."""
    pictures: list[Shown]


class Headline(NamedTuple):
    """A figure with its standard error, both in its unit."""

    name: str
    value: float
    error: float | None
    unit: str
    """"%": value and error are fractions."""
    about: str


class Outcomes(ABC):
    """Of one evaluation."""

    unit: str
    """What the confusion matrix counts."""
    palette: Sequence[Sequence[int]] | None = None
    """The classes' colors in the galleries."""

    def __init__(self, dataset: ImageDataset, class_names: Sequence[str]) -> None:
        self.dataset, self.class_names = dataset, list(class_names)
        self.kept: list[dict[str, NDArray[Any]]] = []
        """Arrays by name, a row for each image, ``index`` among them."""

    def keep(self, index: Tensor, **values: Tensor) -> None:
        """Add rows; tensors ``[B, ...]`` of any device."""
        self.kept.append({name: value.cpu().numpy() for name, value in {"index": index, **values}.items()})

    def gather(self) -> None:
        """Bring the rows of all processes together, in the order of the images; all call it."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            parts: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(parts, self.kept)
            self.kept = [chunk for part in parts for chunk in part]
        joined = {name: np.concatenate([chunk[name] for chunk in self.kept]) for name in self.kept[0]}
        order = np.argsort(joined["index"], kind="stable")
        self.kept = [{name: values[order] for name, values in joined.items()}]

    @property
    def rows(self) -> dict[str, NDArray[Any]]:
        """All that was kept, once gathered."""
        (rows,) = self.kept
        return rows

    def file(self, row: int) -> str:
        """Of an image."""
        return self.dataset.source.filename(int(self.rows["index"][row]))

    @abstractmethod
    def table(self) -> Iterator[Sequence[Any]]:
        """The headings of predictions.csv, then a row for each image."""

    @abstractmethod
    def confusion(self) -> NDArray[np.int64]:
        """Counts ``[C, C]``: rows are the truth, columns the prediction."""

    @abstractmethod
    def headlines(self) -> list[Headline]:
        """The figures that say how good the model is, the most important first."""

    @abstractmethod
    def galleries(self) -> list[Gallery]:
        """Images worth a look. Raises ValueError or OSError if one cannot be read any more."""


class ClassOutcomes(Outcomes):
    """One class for each image."""

    unit = "images"

    def add(self, index: Tensor, target: Tensor, logits: Tensor) -> None:
        """A batch: ``[B]``, ``[B]``, ``[B, C]``."""
        logs = logits.detach().float().log_softmax(dim=-1)
        best = logs.topk(len(self.class_names) if len(self.class_names) <= ALL_PROBABILITIES else 5)
        loss = -logs.gather(1, target[:, None]).squeeze(1)
        self.keep(
            index, target=target, predicted=logits.argmax(dim=1), loss=loss, best=best.indices,
            probability=best.values.exp(),
        )  # fmt: skip

    def table(self) -> Iterator[Sequence[Any]]:
        rows, names = self.rows, self.class_names
        every = len(names) <= ALL_PROBABILITIES
        more = [f"p({name})" for name in names] if every else [f"{x}_{k}" for k in range(2, 6) for x in ("class", "p")]
        yield "file", "label", "predicted", "p", "p_label", *more
        for row, (target, predicted, loss, best, p) in enumerate(
            zip(*(rows[name].tolist() for name in ("target", "predicted", "loss", "best", "probability")), strict=True)
        ):
            if every:
                tail = [f"{value:.6g}" for _, value in sorted(zip(best, p, strict=True))]
            else:
                tail = [cell for i, value in zip(best[1:], p[1:], strict=True) for cell in (names[i], f"{value:.6g}")]
            yield self.file(row), names[target], names[predicted], f"{p[0]:.6g}", f"{math.exp(-loss):.6g}", *tail

    def confusion(self) -> NDArray[np.int64]:
        classes = len(self.class_names)
        cells = self.rows["target"].astype(np.int64) * classes + self.rows["predicted"]
        return np.bincount(cells, minlength=classes**2).reshape(classes, classes)

    def headlines(self) -> list[Headline]:
        confusion, loss, count = self.confusion(), self.rows["loss"].astype(np.float64), len(self.rows["index"])
        right, support = np.diagonal(confusion), confusion.sum(axis=1)
        top1, majority, there = right.sum() / count, int(support.argmax()), support > 0
        recall, spread = right[there] / support[there], count**-0.5
        balanced = math.sqrt((recall * (1 - recall) / support[there]).sum()) / there.sum()
        guess = f"always {self.class_names[majority]} would give {support[majority] / count:.1%}"
        found = [Headline("Top-1 accuracy", top1, spread * math.sqrt(top1 * (1 - top1)), "%", guess)]
        if len(self.class_names) > 5:
            top5 = (self.rows["best"][:, :5] == self.rows["target"][:, None]).any(axis=1).mean()
            found.append(Headline("Top-5 accuracy", top5, spread * math.sqrt(top5 * (1 - top5)), "%", ""))
        chance = f"guessing gives {math.log(len(self.class_names)):.3f}"
        return [
            *found,
            Headline("Balanced accuracy", recall.mean(), balanced, "%", "mean of the classes' recalls"),
            Headline("Cross-entropy", loss.mean(), spread * loss.std(), "nats", chance),
        ]

    def galleries(self) -> list[Gallery]:
        rows, names = self.rows, self.class_names
        wrong = np.flatnonzero(rows["predicted"] != rows["target"])
        worst = wrong[np.argsort(-rows["loss"][wrong], kind="stable")]
        margin = rows["probability"][:, 0] - rows["probability"][:, 1]
        margin[worst[:SHOWN]] = np.inf
        unsure = np.argsort(margin, kind="stable")[: max(0, len(margin) - len(worst[:SHOWN]))]

        def shown(row: int) -> Shown:
            dataset = self.dataset
            image, _ = dataset.source.read(int(rows["index"][row]), dataset.smallest, dataset.rules)
            image.thumbnail((THUMBNAIL, THUMBNAIL))
            first, second = rows["best"][row, :2]
            target, predicted, (p, q) = rows["target"][row], rows["predicted"][row], rows["probability"][row, :2]
            note = f"labeled {names[target]}, predicted {names[predicted]} ({p:.0%})"
            if predicted == target:
                note = f"{names[first]} ({p:.0%}) or {names[second]} ({q:.0%}), rightly the first"
            return Shown(image, self.file(row), note)

        return [
            Gallery(title, about, [shown(int(row)) for row in chosen[:SHOWN]])
            for title, about, chosen in (
                ("Worst mistakes", "Least probability for the label first. Wrong labels are often found here.", worst),
                ("Least sure", "Besides those: the two likeliest classes closest to each other first.", unsure),
            )
        ]


class PixelOutcomes(Outcomes):
    """One class for each pixel."""

    unit = "pixels"

    def __init__(self, dataset: ImageDataset, class_names: Sequence[str], palette: Sequence[Sequence[int]]) -> None:
        super().__init__(dataset, class_names)
        self.palette: Sequence[Sequence[int]] = palette
        self.counts = np.zeros((len(class_names), len(class_names)), np.int64)
        self.pictures: list[tuple[float, int, Image.Image]] = []
        """IoU, index, and annotation beside prediction, of the best and the worst so far."""

    def add(self, index: Tensor, images: Tensor, target: Tensor, predicted: Tensor) -> None:
        """A batch: ``[B]``, uint8 ``[B, 3, H, W]``, and classes ``[B, H, W]``, in the targets `IGNORED` among them."""
        classes, truth, found = len(self.class_names), target.cpu().numpy(), predicted.cpu().numpy()
        labeled = truth != IGNORED
        row = np.broadcast_to(np.arange(len(truth))[:, None, None], truth.shape)[labeled]
        cells = (row * classes + truth[labeled]) * classes + found[labeled]
        confusion = np.bincount(cells, minlength=len(truth) * classes**2).reshape(-1, classes, classes)
        self.counts += confusion.sum(axis=0)
        right = np.diagonal(confusion, axis1=1, axis2=2)
        sums = np.stack([right, confusion.sum(axis=2), confusion.sum(axis=1)], axis=1)
        self.keep(index, sums=torch.from_numpy(sums))
        for number, iou, *maps in zip(index.tolist(), _miou(sums).tolist(), images, truth, found, strict=True):
            if not math.isnan(iou):
                self._picture(iou, number, *maps)

    def _picture(self, iou: float, index: int, pixels: Tensor, *maps: NDArray[np.uint8]) -> None:
        ranked = sorted(score for score, *_ in self.pictures)
        if len(ranked) == 2 * OVERLAYS and ranked[OVERLAYS - 1] <= iou <= ranked[OVERLAYS]:
            return
        step = -(-max(maps[0].shape) // OVERLAY_SIDE)
        image = Image.fromarray(pixels[:, ::step, ::step].permute(1, 2, 0).contiguous().cpu().numpy())
        shown = [overlaid(image, classes[::step, ::step].astype(np.uint8), self.palette) for classes in maps]
        self.pictures.append((iou, index, beside(shown)))
        self.pictures.sort(key=lambda one: one[:2])
        if len(self.pictures) > 2 * OVERLAYS:
            del self.pictures[OVERLAYS]

    def gather(self) -> None:
        super().gather()
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            parts: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(parts, (self.counts, self.pictures))
            self.counts = np.sum([counts for counts, _ in parts], axis=0)
            self.pictures = sorted((one for _, own in parts for one in own), key=lambda one: one[:2])

    def table(self) -> Iterator[Sequence[Any]]:
        yield "file", "miou", "pixel_accuracy", "labeled_pixels"
        sums = self.rows["sums"]
        figures = zip(
            _miou(sums).tolist(), _pixel_accuracy(sums).tolist(), sums[:, 1].sum(axis=1).tolist(), strict=True
        )
        for row, (miou, accuracy, labeled) in enumerate(figures):
            yield self.file(row), f"{miou:.6g}", f"{accuracy:.6g}", labeled

    def confusion(self) -> NDArray[np.int64]:
        return self.counts

    def headlines(self) -> list[Headline]:
        """Errors are jackknife estimates: each image is left out in turn."""
        own = self.rows["sums"]
        total, count = own.sum(axis=0), len(own)
        scored, found = f"over {(total[1] > 0).sum()} of {len(self.class_names)} classes", []
        for name, kind in {"mIoU": _miou, "Mean accuracy": _mean_accuracy, "Pixel accuracy": _pixel_accuracy}.items():
            error = math.sqrt((count - 1) * kind(total - own).var()) if count > 1 else None
            found.append(Headline(name, float(kind(total)), error, "%", scored if name == "mIoU" else ""))
        return found

    def galleries(self) -> list[Gallery]:
        shown = [
            Shown(picture, self.dataset.source.filename(index), f"mIoU {iou:.1%}")
            for iou, index, picture in self.pictures
        ]
        about = "Annotation on the left, prediction on the right; mIoU over the classes of the image."
        half = min(OVERLAYS, (len(shown) + 1) // 2)
        return [
            Gallery("Worst segmented", about, shown[:half]),
            Gallery("Best segmented", about, shown[: half - 1 : -1][:OVERLAYS]),
        ]


def _miou(sums: NDArray[np.int64]) -> NDArray[np.float64]:
    """Mean IoU over the annotated classes, of right, annotated and predicted pixels ``[..., 3, C]``."""
    right, truth, predicted = np.moveaxis(sums, -2, 0)
    return _mean(right, truth + predicted - right, truth > 0)


def _mean_accuracy(sums: NDArray[np.int64]) -> NDArray[np.float64]:
    right, truth, _ = np.moveaxis(sums, -2, 0)
    return _mean(right, truth, truth > 0)


def _pixel_accuracy(sums: NDArray[np.int64]) -> NDArray[np.float64]:
    right, truth, _ = np.moveaxis(sums.sum(axis=-1), -1, 0)
    return _mean(right[..., None], truth[..., None], truth[..., None] > 0)


def _mean(part: NDArray[np.int64], whole: NDArray[np.int64], there: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Of fractions, over the classes that are there; nan where none is."""
    with np.errstate(invalid="ignore"):
        mean: NDArray[np.float64] = np.where(there, part / np.maximum(whole, 1), 0).sum(axis=-1) / there.sum(axis=-1)
    return mean


def beside(images: Sequence[Image.Image], gap: int = 4) -> Image.Image:
    """Images of one size in a row, transparent between them."""
    width, height = images[0].size
    row = Image.new("RGBA", (len(images) * (width + gap) - gap, height))
    for number, image in enumerate(images):
        row.paste(image, (number * (width + gap), 0))
    return row
