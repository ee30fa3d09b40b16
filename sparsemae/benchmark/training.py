"""Training beside timm's: the input pipeline on one core, and optimizer steps at ViT-B/16 size.

Subjects take turns, run after run, each warm; medians count. The pipeline and timm's `create_loader` read the same
JPEGs with the same transforms in one loader process each, everything pinned to one core, so that a rate is images per
second and core; where the time goes is measured stage by stage. A step is that of the recipes, with random images;
sparse training multiplies dense matrices (the mask moves), so a step costs what a dense one does, and the masks on top.
"""

import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import chain, islice, repeat
from typing import Any, NamedTuple

import torch
from lightning_fabric import Fabric
from timm import create_model
from timm.data import ImageDataset as TimmDataset, create_loader
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, default_collate

from sparsemae.benchmark.timing import aligned, seconds, take_turns
from sparsemae.config import read_config
from sparsemae.data.crops import Crops
from sparsemae.data.dataset import ImageDataset
from sparsemae.data.jpeg import decoded_by
from sparsemae.data.loader import batches
from sparsemae.data.sampling import BatchPlan, TrainingSampler
from sparsemae.data.sources import open_source
from sparsemae.data.splits import Source
from sparsemae.data.transforms import normalize, training_transform
from sparsemae.jobs import training_jobs
from sparsemae.models import use_plain_attention
from sparsemae.options import ImageDataConfig, TrainerConfig
from sparsemae.sparsity import MaskSchedule
from sparsemae.tasks import task_class
from sparsemae.tasks.sparse import make_sparse
from sparsemae.training.device import resolved_precision
from sparsemae.training.optim import make_optimizer
from sparsemae.training.step import optimizer_step

LOADER_BATCH = 32
_PREFETCHED = 2  # batches that a loader process makes ahead
_PASSES = 6  # over the images, in one timed run


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
    rates: list[Rate] = []
    with suppress(KeyboardInterrupt):  # what there is until then is the result
        if images is not None:
            data = ImageDataConfig(source="folder", root=images)
            source = open_source(data, "train")
            if len(source) < LOADER_BATCH:
                raise ValueError(f"images: {images}: wanted {LOADER_BATCH} training images or more, got {len(source)}")
            with using(1, one_core=True):
                for part in (_pipelines, _stages):
                    rates += _told(part(data, source, runs))
        if step_batch:
            with using(threads):
                rates += _told(_steps(step_batch, runs))
    return rates


def _told(rates: list[Rate]) -> list[Rate]:
    """The same, each said as soon as it is known."""
    for rate in rates:
        print(f"{rate.part}: {rate.subject}: {rate.images_per_second:.1f} images/s", file=sys.stderr, flush=True)
    return rates


def table(rates: list[Rate]) -> str:
    """The figures as text."""
    cells = [
        [rate.part, rate.subject, f"{rate.images_per_second:.1f}", "" if rate.ratio is None else f"{rate.ratio:.2f}"]
        for rate in rates
    ]
    return aligned([["part", "subject", "images/s", "ratio"], *cells], 2)


@contextmanager
def using(threads: int, one_core: bool = False) -> Iterator[None]:
    """That many threads, on one core if told, loader processes included, where the system can."""
    before, cores = torch.get_num_threads(), getattr(os, "sched_getaffinity", lambda _: {0})(0)
    pin = getattr(os, "sched_setaffinity", lambda *_: None)
    torch.set_num_threads(threads)
    pin(0, {max(cores)} if one_core else cores)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        pin(0, cores)


def _pipelines(data: ImageDataConfig, source: Source, runs: int) -> list[Rate]:
    count = max(1, _PASSES * len(source) // LOADER_BATCH)
    sampler = TrainingSampler(BatchPlan.make(len(source), LOADER_BATCH, None, 1), 0, 0, 0, 1_000_000)

    def ours(library: str, resize_on: Any = "loader") -> Iterator[Tensor | Crops]:
        dataset = ImageDataset(decoded_by(library, source), training_transform(replace(data, resize_on=resize_on)))
        for batch in batches(dataset, sampler, workers=1):
            found = batch["image"]
            yield normalize(found, data.mean, data.std) if resize_on == "loader" else found

    def fed(start: Callable[[], Iterator[Any]]) -> float:
        feed = start()  # a new process each time, which ends with the feed: how its memory lies is luck, worth 5 %
        deque(islice(feed, 2 * _PREFETCHED), 0)
        return seconds(lambda: deque(islice(feed, count), 0)) / (count * LOADER_BATCH)

    subjects = {
        "ours": partial(ours, "pillow"),
        "ours with data.jpeg=torchvision": partial(ours, "torchvision"),
        "timm's create_loader": partial(_timm_loader, data, source, count),
        "ours with data.jpeg=torchvision and data.resize_on=device, without the device's part":
            partial(ours, "torchvision", "device"),
        "timm's create_loader without the device's part": partial(_timm_loader, data, source, count, to_device=False),
    }  # fmt: skip
    times = take_turns({name: partial(fed, feed) for name, feed in subjects.items()}, runs)
    *_, rival, _, rival_alone = times.values()
    rivals = (rival, rival, None, rival_alone, None)
    return [
        Rate("input pipeline", f"{name}, one core", 1 / time, None if than is None else than / time)
        for (name, time), than in zip(times.items(), rivals, strict=True)
    ]


def _timm_loader(data: ImageDataConfig, source: Source, count: int, to_device: bool = True) -> Iterator[Any]:
    """timm's loader with its best settings: no pause between epochs, the transform that ours has.

    What it does on the device is normalize.
    """
    images: Any = TimmDataset("", reader=source.reader)
    ours: Any = training_transform(data)
    images.transform = ours.steps
    repeated: ConcatDataset[Any] = ConcatDataset([images] * (count * LOADER_BATCH // len(source) + 1))
    loader = create_loader(
        repeated, data.img_size, LOADER_BATCH, is_training=True, num_workers=1, device=torch.device("cpu"),
        mean=data.mean, std=data.std, use_multi_epochs_loader=True,
    )  # fmt: skip
    return (batch for batch, _ in chain.from_iterable(repeat(loader if to_device else loader.loader)))


def _stages(data: ImageDataConfig, source: Source, runs: int) -> list[Rate]:
    """The pipeline's parts, each on what the part before it made of the same images."""
    transform: Any = training_transform(data)
    *augment, to_tensor = transform.steps.transforms
    works: dict[str, Callable[[Any], Any]] = {
        "decode": lambda numbers: [source.read(i)[0] for i in numbers],
        "crop, resize and flip": lambda images: [reduce(lambda x, step: step(x), augment, image) for image in images],
        "to bytes [3, H, W]": lambda images: [to_tensor(image) for image in images],
        "collate (copy)": default_collate,
        "normalize": lambda batch: normalize(batch, data.mean, data.std),
    }
    count = min(len(source), 4 * LOADER_BATCH)
    given: Any = range(count)
    timed = {}
    for name, work in works.items():
        timed[name] = partial(seconds, partial(work, given))
        given = work(given)
    times = take_turns(timed, runs)
    total = sum(times.values())
    return [Rate("stage", f"{name}, {time / total:.0%} of the time", count / time) for name, time in times.items()]


def _steps(batch: int, runs: int) -> list[Rate]:
    steps = {
        "pretrain_t, 147 + 1 tokens and the decoder": subject("pretrain_t", batch, "2:32").step,
        "pretrain_t, dense": subject("pretrain_t", batch, "dense").step,
        "finetune_t, 196 + 1 tokens": subject("finetune_t", batch, "2:32").step,
        "finetune_t, dense": subject("finetune_t", batch, "dense").step,
        "timm's dense ViT-B/16, classification": _timm_step(batch),
    }
    times = take_turns({name: partial(seconds, step) for name, step in steps.items()}, runs)
    pretrain, dense_pretrain, finetune, dense_finetune, timms = times
    rivals = {pretrain: dense_pretrain, dense_pretrain: timms, finetune: dense_finetune, dense_finetune: timms}
    return [
        Rate("step", name, batch / time, times[rivals[name]] / time if name in rivals else None)
        for name, time in times.items()
    ]


def subject(recipe: str, batch: int, pattern: str) -> Subject:
    """A recipe's model with another pattern, and its optimizer step on blank images, at learning rate 0."""
    options = training_jobs()[recipe.partition("_")[0]]
    config = read_config(options, ["--config", recipe, "--sparse.pattern", pattern])
    task = task_class(config.task)(config)
    task.class_names = [str(number) for number in range(task.dataset_size[1])]
    model = task.build(task.card(), config.model.drop_path)
    make_sparse(model, config.sparse)
    task.prepare(model, Fabric(accelerator="cpu", devices=1), BatchPlan.make(batch, batch, None, 1))
    masks = MaskSchedule(model, in_bf16=_best_precision() == "bf16")
    optimizer, forward = make_optimizer(model, config.optim), task.wrapped(model)
    example, autocast = task.example_batch(model, batch), _autocast(model)

    def backward() -> None:
        with autocast:
            loss = task.loss(forward, example)
        loss.backward()  # type: ignore[no-untyped-call]

    def step() -> None:
        optimizer_step(model, optimizer, masks.step(0.0), backward, config.sparse, config.optim)

    return Subject(model.train(), optimizer, step)


def _timm_step(batch: int) -> Callable[[], None]:
    model = create_model("vit_base_patch16_224").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    images, target, autocast = torch.zeros(batch, 3, 224, 224), torch.zeros(batch, dtype=torch.long), _autocast(model)

    def step() -> None:
        with autocast:
            loss = nn.functional.cross_entropy(model(images).float(), target)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return step


def _best_precision() -> str:
    return resolved_precision(TrainerConfig(accelerator="cpu"))


def _autocast(model: nn.Module) -> AbstractContextManager[Any]:
    """The precision that is best here."""
    if _best_precision() != "bf16":
        return nullcontext()
    use_plain_attention(model)
    return torch.autocast("cpu", torch.bfloat16)
