"""Settings that follow from the data, where neither the user nor a recipe names them: one rule for all jobs.

Between the demo's 28 px and the paper's ViT-B on ImageNet: a ViT-Ti at 128 px on a processor, a ViT-S at 224 px on a
GPU (a ViT-B where timm's weights are fetched for it). What is named is kept, and the rest follows from it: the rate
from the batch, the warm-up from the length. The numbers below work on the sets of the tests; they were not tuned.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

from sparsemae.limits import value_of, with_values
from sparsemae.options.model import DEFAULT_MODEL, InferenceConfig
from sparsemae.options.tasks import TrainingConfig

C = TypeVar("C", bound=TrainingConfig)
SMALL_SET = 5_000
"""Below so many images augmentation is light, for lack of the epochs that a heavy one takes."""
RATE_BATCH = 64
"""The batch that the rates of `RULES` are for."""


class Rule(NamedTuple):
    """What differs between the jobs."""

    rate: float
    """Peak learning rate for a batch of `RATE_BATCH`, from random weights."""
    rate_started: float
    """The same from somebody's weights."""
    largest_batch: int
    seen: int
    """Images to be seen on a processor, over all epochs; on a GPU ten times as many."""
    least_epochs: int


RULES = {
    "pretrain": Rule(2e-3, 1e-3, 64, 24_000, 20),
    "classify": Rule(1e-3, 1e-3, 64, 12_000, 10),
    "segment": Rule(1e-3, 5e-4, 16, 4_000, 10),
}
MOST_EPOCHS = 100


@dataclass(frozen=True)
class Facts:
    """What is known of the data and of the machine."""

    images: int
    """For training."""
    side: int
    """Median of the images' shorter side, px."""
    start: Literal["random", "dense", "sparse"] = "random"
    """What the weights to start from are."""
    gpu: bool = False
    processors: int = 1


def derive(config: C, facts: Facts) -> tuple[C, str]:
    """The options with those of `from_data` set, and a line that says to what, and why; "" if there are none."""
    choice = _Choice(config, facts)
    rule = RULES.get(config.task)
    if rule is None or not config.from_data:
        return config, ""
    patch = _model(choice)
    side = _side(choice, patch)
    _batch_and_length(choice, rule)
    if config.task == "segment":
        _window(choice, side)
    else:
        _augmentation(choice)
    kept = {name: value for name, value in choice.settings.items() if name in config.from_data}
    return with_values(config, kept), f"settings from {facts.images:,} images: {'; '.join(choice.reasons)}"


class _Choice:
    """Collects settings: what is open is chosen, what is named stays."""

    def __init__(self, config: TrainingConfig, facts: Facts) -> None:
        self.config, self.facts = config, facts
        self.settings: dict[str, Any] = {}
        self.reasons: list[str] = []

    def open(self, *names: str) -> bool:
        """Whether all of them are to be chosen."""
        return set(names) <= set(self.config.from_data)

    def pick(self, name: str, value: Any, said: str = "") -> Any:
        """Choose one if it is open, and say so; what it is then."""
        if not self.open(name):
            return value_of(self.config, name)
        self.settings[name] = value
        self.reasons += [said] * bool(said)
        return value


def _model(choice: _Choice) -> int:
    """The network; returns its patch side, px."""
    facts, init = choice.facts, choice.config.init
    if init in (None, "auto"):
        size = ("small" if init is None else "base") if facts.gpu else "tiny"
        name = f"vit_{size}_patch16_224"
        choice.pick("model.name", name, f"model {name} (for a {'GPU' if facts.gpu else 'processor'})")
    choice.pick("model.drop_path", 0.0 if facts.images < SMALL_SET else 0.1)
    gradual = facts.start == "dense" and choice.config.sparse.init_weights == "full"
    choice.pick("sparse.schedule", "gradual" if gradual else "constant",
                "mask tightened in stages (the start is dense)" * gradual)  # fmt: skip
    if choice.config.task == "pretrain":
        choice.settings |= {
            "decoder.embed_dim": 256 if facts.gpu else 128, "decoder.depth": 4 if facts.gpu else 2,
            "decoder.num_heads": 4,
        }  # fmt: skip
    named = [part for part in (choice.config.model.name or DEFAULT_MODEL).split("_") if part.startswith("patch")]
    patch = choice.config.model.args.get("patch_size", named[0][5:] if named else 16)
    return int(patch) if str(patch).isdigit() else 16


def _side(choice: _Choice, patch: int) -> int:
    facts = choice.facts
    usual = 224 if facts.gpu else 128
    side = max(4 * patch, min(usual, facts.side)) // patch * patch
    why = "a processor's" if side == usual // patch * patch and not facts.gpu else "the images' median shorter side"
    side = choice.pick("data.img_size", side, f"{side} px ({'a GPU' if facts.gpu else why})")
    choice.pick(
        "data.workers", min(8, facts.processors - 1), f"workers {min(8, facts.processors - 1)} (processors - 1)"
    )
    return int(side)


def _batch_and_length(choice: _Choice, rule: Rule) -> None:
    facts, trainer = choice.facts, choice.config.trainer
    wanted = 2 ** int(math.log2(max(2, min(rule.largest_batch, facts.images // 8))))
    batch = choice.pick("trainer.global_batch", wanted, f"batch {wanted} (at most images / 8)")
    steps = max(1, facts.images // batch)
    if choice.open("trainer.steps"):
        choice.pick("trainer.steps", None)
        seen = rule.seen * (10 if facts.gpu else 1)
        epochs = max(rule.least_epochs, min(MOST_EPOCHS, round(seen / facts.images)))
        epochs = choice.pick("trainer.epochs", epochs, f"{epochs} epochs ({epochs * facts.images:,} images seen)")
        total = round(epochs * steps)
    else:
        total = trainer.steps or round(trainer.epochs * steps)
    started = facts.start != "random"
    base = rule.rate_started if started else rule.rate
    rate = float(f"{base * batch / RATE_BATCH:.3g}")
    rate = choice.pick("optim.lr", rate, f"lr {rate:g} (linear rule: {base:g} for {RATE_BATCH})")
    choice.pick("optim.min_lr", float(f"{rate / 100:.3g}"))
    choice.pick("optim.layer_decay", 0.75 if started and choice.config.task != "pretrain" else 1.0)
    if choice.open("optim.warmup_steps", "optim.warmup_epochs"):
        choice.pick("optim.warmup_steps", total // 10, f"warm-up {total // 10} steps (a tenth)")
        choice.pick("optim.warmup_epochs", 0.0)
    else:
        choice.pick("optim.warmup_steps", None)
    if choice.config.task != "pretrain":
        choice.pick("trainer.keep", "best", "the best epoch is written")


def _augmentation(choice: _Choice) -> None:
    small = choice.facts.images < SMALL_SET
    choice.pick("data.crop_scale", (0.35, 1.0) if small else (0.2, 1.0))
    if choice.config.task != "classify":
        return
    choice.pick("data.auto_augment", None if small else "rand-m9-mstd0.5-inc1")
    mixed = [choice.pick(name, 0.0 if small else value) for name, value in (("mixup", 0.8), ("cutmix", 1.0))]
    choice.pick("erasing", 0.0 if small else 0.25)
    if not any(mixed):
        choice.reasons.append(f"light augmentation (below {SMALL_SET:,} images)" if small else "")


def _window(choice: _Choice, side: int) -> None:
    short = max(side, min(2 * side, choice.facts.side))
    choice.pick("data.short_side", short, f"images resized to {short} px")
    choice.pick("data.long_side", 4 * short)
    stride = InferenceConfig().of_window(side).stride
    choice.pick("inference.stride", stride, f"window {side} px, stride {stride} (two thirds)")
    choice.pick("head.width", 256 if choice.facts.gpu else 64)
    choice.pick("head.auxiliary_width", 128 if choice.facts.gpu else 32)
