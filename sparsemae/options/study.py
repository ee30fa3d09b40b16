"""The options of a study: arms x settings x seeds."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from sparsemae.limits import ABOVE_0, AT_LEAST_1, Options, option

MOST_SEEDS = 10


@dataclass
class ArmConfig(Options):
    """One way to a small network, as what its trainings take beyond the study's own options."""

    prefix: ClassVar[str] = "arms."

    pretrain: dict[str, Any] | None = None
    """Options of its pretraining, by name; None: it is finetuned from scratch. Arms with equal ones share it."""
    finetune: dict[str, Any] = field(default_factory=dict)
    """Options of its finetuning, by name."""
    seeds: int | None = option(None, AT_LEAST_1)
    """None: the study's, of which there are no more in any case."""


@dataclass
class SettingConfig:
    """What arms are compared under, the same for all of them: how many labels, which architecture, how long."""

    pretrain: dict[str, Any] = field(default_factory=dict)
    """Options of every pretraining, by name. An arm's own come after them."""
    finetune: dict[str, Any] = field(default_factory=dict)
    """Options of every finetuning, by name."""


@dataclass
class StudyConfig(Options):
    """Compare arms at several seeds: pretrain, finetune at the best of some learning rates, measure on the test set."""

    out: str = "runs/study"
    """Folder of the runs and of results.jsonl. Started again, the study goes on there."""
    root: str | None = option(None, must_exist=lambda config: config.report is None)
    """Images in class folders below train, val and test. Learning rates are chosen by val, figures taken on test.
    None: the embedded images, 2,000 training images of which are val."""
    job: Literal["finetune", "segment"] = "finetune"
    """What follows pretraining: classification, whose figure is top-1, or segmentation, whose is mIoU. Of segmentation,
    root has images/{train,val,test}, masks/{train,val,test} and classes.txt, with the name of a class on each line; the
    embedded images have masks computed from them."""
    pretrain: dict[str, Any] = field(default_factory=lambda: {"config": "demo_pretrain"})
    """Options of all pretrainings, a recipe as config among them."""
    finetune: dict[str, Any] = field(default_factory=lambda: {"config": "demo_finetune"})
    """Options of all finetunings, for classes or for masks."""
    settings: dict[str, SettingConfig] = field(default_factory=dict)
    """What arms are compared under, by title."""
    arms: dict[str, ArmConfig] = field(default_factory=dict)
    """What is compared, by title; the first one with each of the others."""
    learning_rates: list[float] = field(default_factory=lambda: [8e-3], metadata={"limits": ABOVE_0})
    """Of finetuning, tried by every arm in every setting."""
    selection_seeds: int = option(2, AT_LEAST_1)
    """Seeds at which each learning rate is tried."""
    seeds: int = option(5, (0, MOST_SEEDS))
    """Seeds of each arm's figures, of pretraining and finetuning alike. 0: only learning rates are chosen, to look for
    a setting that can tell arms apart without a look at the test images."""
    first_seed: int = 0
    """A winner among several is confirmed on fresh seeds."""
    at_a_time: int | None = option(None, AT_LEAST_1)
    """Trainings in parallel, one thread each; None: as many as cores, at most 4."""
    plan: bool = False
    """Only count the trainings, measure the rate of each kind, and say what the study takes."""
    print_commands: Literal["shell", "slurm"] | None = None
    """Only print the trainings as commands for a cluster. slurm: write two arrays into out, and print how to submit
    them. Started there without it when they have ended, the study collects their results."""
    report: str | None = None
    """Only write this page, and its pictures beside it, from the results there are."""
