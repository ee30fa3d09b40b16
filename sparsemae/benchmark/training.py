"""Training beside timm's: the input pipeline on one core, and optimizer steps at ViT-B/16 size.

Subjects take turns, run after run, each warm; medians count. The pipeline and timm's `create_loader` read the same
JPEGs with the same transforms in one loader process each, everything pinned to one core, so that a rate is images per
second and core; where the time goes is measured stage by stage. A step is that of the recipes, with random images;
sparse training multiplies dense matrices (the mask moves), so a step costs what a dense one does, and the masks on top.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain, islice, repeat
from statistics import median
from typing import Any, NamedTuple

import torch
from lightning_fabric import Fabric
from timm import create_model
from timm.data import create_loader
from timm.data import dataset as timm_dataset
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, default_collate

from sparsemae.config import read_config
from sparsemae.data.dataset import ImageDataset
from sparsemae.data.loader import batches
from sparsemae.data.sampling import BatchPlan, TrainingSampler
from sparsemae.data.sources import Source, open_source
from sparsemae.data.transforms import normalize, training_transform
from sparsemae.jobs import training_jobs
from sparsemae.models import use_plain_attention
from sparsemae.options import ImageDataConfig, TrainerConfig
from sparsemae.sparsity import MaskSchedule
from sparsemae.tasks import task_class
from sparsemae.tasks.sparse import make_sparse
from sparsemae.training.config import resolved_precision
from sparsemae.training.optim import make_optimizer
from sparsemae.training.step import optimizer_step

LOADER_BATCH = 32
_PREFETCHED = 2  # batches that a loader process makes ahead
_PASSES = 6  # over the images, in one timed run
_RIVAL_STEP = "timm's dense ViT-B/16, classification"


class Subject(NamedTuple):
    """Something to train."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: Callable[[], None]
    """An optimizer step on random images, at learning rate 0."""


@dataclass
class Rate:
    """One subject's speed."""

    part: str
    """input pipeline, stage or step."""
    subject: str
    images_per_second: float
    ratio: float | None = None
    """To its rival's; None for the rival itself, and for stages."""


def measure(images: str | None, step_batch: int, threads: int, runs: int) -> list[Rate]:
    """Rates of the input pipeline, of its stages, and of optimizer steps.

    Raises ValueError, naming the folder, if it cannot be read, or holds fewer images than a batch.
    """
    rates = []
    if images is not None:
        data = ImageDataConfig(source="folder", root=images)
        source = open_source(data, "train")
        if len(source) < LOADER_BATCH:
            raise ValueError(f"images: {images}: wanted {LOADER_BATCH} training images or more, got {len(source)}")
        with _one_core():
            rates += _pipelines(data, source, runs) + _stages(data, source, runs)
    if step_batch:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        rates += _steps(step_batch, runs)
        torch.set_num_threads(before)
    return rates


def table(rates: list[Rate]) -> str:
    """The figures as text."""
    lines = [f"{'part':<16}{'subject':<48}{'images/s':>10}{'ratio':>8}"]
    for rate in rates:
        ratio = f"{rate.ratio:8.2f}" if rate.ratio is not None else ""
        lines.append(f"{rate.part:<16}{rate.subject:<48}{rate.images_per_second:10.1f}{ratio}")
    return "\n".join(lines)


@contextmanager
def _one_core() -> Iterator[None]:
    """One thread on one core, loader processes included, where the system can."""
    threads, cores = torch.get_num_threads(), getattr(os, "sched_getaffinity", lambda _: None)(0)
    torch.set_num_threads(1)
    if cores:
        os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if cores:
            os.sched_setaffinity(0, cores)


def _pipelines(data: ImageDataConfig, source: Source, runs: int) -> list[Rate]:
    count = max(1, _PASSES * len(source) // LOADER_BATCH)
    plan = BatchPlan.make(len(source), LOADER_BATCH, None, 1)
    sampler = TrainingSampler(plan, 0, 0, 0, 1_000_000)

    def ours() -> Iterator[Tensor]:
        for batch in batches(ImageDataset(source, training_transform(data)), sampler, workers=1):
            yield normalize(batch["image"], data.mean, data.std)

    feeds: dict[str, Callable[[], Iterator[Tensor]]] = {
        "ours": ours,
        "timm's create_loader": lambda: _timm_loader(data, source, count),
    }
    times: dict[str, list[float]] = {name: [] for name in feeds}
    for turn in range(runs + 1):
        for name, start in list(feeds.items())[:: 1 if turn % 2 else -1]:
            feed = start()  # a new process each time: how its memory lies is luck, worth 5 %
            _consume(feed, 2 * _PREFETCHED)
            begin = time.perf_counter()
            _consume(feed, count)
            if turn:
                times[name].append((time.perf_counter() - begin) / (count * LOADER_BATCH))
            del feed  # ends the process
    names = list(feeds)
    own, rival = (1 / median(seconds) for seconds in times.values())
    return [
        Rate("input pipeline", f"{names[0]}, one core", own, own / rival),
        Rate("input pipeline", f"{names[1]}, one core", rival),
    ]


def _timm_loader(data: ImageDataConfig, source: Source, count: int) -> Iterator[Any]:
    """timm's loader with its best settings: no pause between epochs, the transform that ours has."""
    images: Any = timm_dataset.ImageDataset("", reader=source.reader)
    images.transform = training_transform(data).steps
    repeated: ConcatDataset[Any] = ConcatDataset([images] * (count * LOADER_BATCH // len(source) + 1))
    loader = create_loader(
        repeated, data.img_size, LOADER_BATCH, is_training=True, num_workers=1, device=torch.device("cpu"),
        mean=data.mean, std=data.std, use_multi_epochs_loader=True,
    )  # fmt: skip
    return (batch for batch, _ in chain.from_iterable(repeat(loader)))


def _consume(feed: Iterator[Any], count: int) -> None:
    for _ in islice(feed, count):
        pass


def _stages(data: ImageDataConfig, source: Source, runs: int) -> list[Rate]:
    """The pipeline's parts, one after the other on the same images."""
    steps: Any = training_transform(data).steps
    *augment, to_tensor = steps.transforms
    numbers = range(min(len(source), 4 * LOADER_BATCH))

    def augmented(image: Any) -> Any:
        for transform in augment:
            image = transform(image)
        return image

    names = ("decode", "crop, resize and flip", "to bytes [3, H, W]", "collate (copy)", "normalize")
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(runs + 1):
        made: Any = list(numbers)
        works: list[Callable[[Any], Any]] = [
            lambda numbers: [source.read(i)[0] for i in numbers],
            lambda images: [augmented(image) for image in images],
            lambda images: [to_tensor(image) for image in images],
            default_collate,
            lambda batch: normalize(batch, data.mean, data.std),
        ]
        for name, work in zip(names, works, strict=True):
            begin = time.perf_counter()
            made = work(made)
            if turn:
                times[name].append((time.perf_counter() - begin) / len(numbers))
    total = sum(median(seconds) for seconds in times.values())
    return [
        Rate("stage", f"{name}, {median(seconds) / total:.0%} of the time", 1 / median(seconds))
        for name, seconds in times.items()
    ]


def _steps(batch: int, runs: int) -> list[Rate]:
    subjects = {
        "pretrain_t, 147 + 1 tokens and the decoder": subject("pretrain_t", batch, "2:32").step,
        "the same, dense": subject("pretrain_t", batch, "dense").step,
        "finetune_t, 196 + 1 tokens": subject("finetune_t", batch, "2:32").step,
        "the same, dense ": subject("finetune_t", batch, "dense").step,
        _RIVAL_STEP: _timm(batch).step,
    }
    times: dict[str, list[float]] = {name: [] for name in subjects}
    for turn in range(runs + 1):
        for name, step in subjects.items():
            begin = time.perf_counter()
            step()
            if turn:
                times[name].append((time.perf_counter() - begin) / batch)
    rival = 1 / median(times[_RIVAL_STEP])
    rates = {name: 1 / median(seconds) for name, seconds in times.items()}
    return [
        Rate("step", name.strip(), rate, rate / rival if name != _RIVAL_STEP else None) for name, rate in rates.items()
    ]


def subject(recipe: str, batch: int, pattern: str) -> Subject:
    """A recipe's model with another pattern, and its optimizer step on blank images, at learning rate 0."""
    job = recipe.partition("_")[0]
    config = read_config(training_jobs()[job], ["--config", recipe, "--sparse.pattern", pattern])
    task = task_class(config.task)(config)
    task.class_names = [str(number) for number in range(task.dataset_size[1])]
    model = task.build(task.card(), config.model.drop_path)
    make_sparse(model, config.sparse)
    task.prepare(model, Fabric(accelerator="cpu", devices=1), BatchPlan.make(batch, batch, None, 1))
    optimizer, masks, forward = make_optimizer(model, config.optim), MaskSchedule(model), task.wrapped(model)
    example, autocast = task.example_batch(model, batch), _autocast(model)

    def backward() -> None:
        with autocast:
            loss = task.loss(forward, example)
        loss.backward()  # type: ignore[no-untyped-call]

    def step() -> None:
        optimizer_step(model, optimizer, masks.step(0.0), backward, config.sparse, config.optim)

    return Subject(model.train(), optimizer, step)


def _timm(batch: int) -> Subject:
    model = create_model("vit_base_patch16_224").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    images, target, autocast = torch.zeros(batch, 3, 224, 224), torch.zeros(batch, dtype=torch.long), _autocast(model)

    def step() -> None:
        with autocast:
            loss = nn.functional.cross_entropy(model(images).float(), target)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return Subject(model, optimizer, step)


def _autocast(model: nn.Module) -> AbstractContextManager[Any]:
    """The precision that is best here."""
    if resolved_precision(TrainerConfig(accelerator="cpu")) != "bf16":
        return nullcontext()
    use_plain_attention(model)
    return torch.autocast("cpu", torch.bfloat16)
