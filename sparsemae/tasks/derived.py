"""Settings from the data, for trainings and plans: the facts, `options.derived`'s rule, and what the start wants."""

from dataclasses import replace
from typing import Any, TypeVar

import torch

from sparsemae.data.survey import median_side
from sparsemae.limits import with_values
from sparsemae.models.architecture import architecture_of
from sparsemae.models.start import input_of
from sparsemae.options import TrainingConfig
from sparsemae.options.derived import SMALL_SET, Facts, derive
from sparsemae.processors import processors
from sparsemae.tasks.task import Task

UNKNOWN_WAYS = ("nearest", "lanczos", "box", "hamming", "random")
"""Of resampling, which others' weights may name and `data.interpolation` has not."""
C = TypeVar("C", bound=TrainingConfig)


def settle(config: C, task: Task[Any]) -> tuple[C, list[str]]:
    """The options as they will be used, and what is to be said of them.

    The network is that of the weights to start from, where the user names none. ``auto`` becomes timm's weights for the
    chosen model. What `TrainingConfig.from_data` lists follows from the images of a task whose data are open. How the
    start's own images were prepared is taken over where it is open, and compared where a recipe is named.
    """
    config, notes = with_model_of_source(config)
    found, start = (None, "random") if config.init is None else (None, "dense")
    if config.init is not None and config.init != "auto":
        found, start = input_of(config.init)
    images = task.sources["train"]
    gpu = config.trainer.accelerator != "cpu" and torch.cuda.is_available()
    side = found.img_size if found is not None and start == "sparse" else median_side(images)
    config, said = derive(config, Facts(len(images), side, start, gpu, processors()))  # type: ignore[arg-type]
    if config.init == "auto":
        init = f"timm:{config.model.name}"
        config, (found, _) = replace(config, init=init), input_of(init)
        notes.append(f"--init auto: {init}")
    notes += [said] * bool(said)
    if found is not None:
        wanted = {f"data.{name}": getattr(found, name) for name in ("mean", "std", "interpolation")}
        differ = {name: value for name, value in wanted.items() if _own(config, name) not in (value, None)}
        taken = {
            name: value for name, value in differ.items() if name in config.from_data and value not in UNKNOWN_WAYS
        }
        config = with_values(config, taken)
        for verb, names in (("as", taken), ("warning: other than", differ.keys() - taken.keys())):
            values = ", ".join(f"--{name} {_shown(differ[name])}" for name in sorted(names))
            notes += [f"{verb} {config.init} was trained: {values}"] * bool(names)
    if config.from_data and config.init is None and config.task != "pretrain" and len(images) < SMALL_SET:
        notes.append(
            f"from random weights, on {len(images):,} images: --init auto (timm's weights for this model, fetched "
            f"once) would help most; without a network, sparsemae pretrain {config.data.root} and --init its folder"
        )
    return config, notes


def with_model_of_source(config: C) -> tuple[C, list[str]]:
    """The options with the network of the weights to start from, where the user names none, and what to say of it."""
    if config.init in (None, "auto") or config.model.name is not None:
        return config, []
    assert config.init is not None
    found = architecture_of(config.init, config.model.args)
    model = replace(config.model, name=found.name, args=found.args)
    return replace(config, model=model), [f"{config.init}: {found} {found.note and f'({found.note})'}".rstrip()]


def _own(config: TrainingConfig, name: str) -> Any:
    return getattr(config.data, name.removeprefix("data."), None)


def _shown(value: Any) -> str:
    return f"'[{', '.join(f'{number:g}' for number in value)}]'" if isinstance(value, tuple) else str(value)
