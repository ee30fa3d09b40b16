"""What a study trains: every arm in every setting at every seed, each encoder once."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from sparsemae.options import ArmConfig, StudyConfig
from sparsemae.study.stages import Stage

CLASSES = "classes.txt"
"""File of the names of the classes of masks, below the root."""
Rates = Mapping[tuple[str, str], float]
"""Learning rate by setting and arm."""


@dataclass(frozen=True)
class Trial:
    """One network of a study, finetuned."""

    setting: str
    arm: str
    seed: int
    lr: float
    stages: tuple[Stage, ...]
    """Its pretraining, if it has one, and its finetuning."""

    @property
    def finetuning(self) -> Stage:
        """The last of its stages."""
        return self.stages[-1]

    def commands(self, out: Path) -> list[list[str]]:
        """One for each stage."""
        return [["sparsemae", stage.job, *stage.argv(out, 0)] for stage in self.stages]

    @property
    def key(self) -> list[Any]:
        """What tells it from the others."""
        return [self.setting, self.arm, self.seed, self.lr]


def selection(study: StudyConfig, root: Path) -> list[Trial]:
    """Every arm at every learning rate; nothing where there is but one."""
    seeds = range(study.first_seed, study.first_seed + study.selection_seeds)
    rates = study.learning_rates if len(study.learning_rates) > 1 else []
    trials = (_trial(study, root, *which, seed, lr) for which in pairs(study) for lr in rates for seed in seeds)
    return [*dict.fromkeys(trials)]


def final(study: StudyConfig, root: Path, chosen: Rates) -> list[Trial]:
    """Every arm at its own learning rate, where that is chosen, on all its seeds."""
    return [
        _trial(study, root, setting, arm, study.first_seed + seed, lr)
        for (setting, arm), lr in chosen.items()
        for seed in range(seeds_of(study, arm))
    ]


def seeds_of(study: StudyConfig, arm: str) -> int:
    """How many there are to be."""
    return min(study.seeds, study.arms[arm].seeds or study.seeds)


def choose(study: StudyConfig, results: list[dict[str, Any]]) -> Rates:
    """For each arm and setting, the rate with the best mean on the held-out images; of equal ones the lowest.

    None where a trial is missing.
    """
    if len(study.learning_rates) == 1:
        return dict.fromkeys(pairs(study), study.learning_rates[0])
    seeds = range(study.first_seed, study.first_seed + study.selection_seeds)
    found = {(row["setting"], row["arm"], row["lr"], row["seed"]): row["val"] for row in results}
    return {
        (setting, arm): max(
            sorted(study.learning_rates), key=lambda lr: fmean(found[setting, arm, lr, seed] for seed in seeds)
        )
        for setting, arm in pairs(study)
        if all((setting, arm, lr, seed) in found for lr in study.learning_rates for seed in seeds)
    }


def stages_of(trials: list[Trial]) -> list[Stage]:
    """Of all trials, in their order, so that the first figures come early; shared ones once.

    Raises:
        ValueError: two would have the same folder.
    """
    stages = dict[str, Stage]()
    for stage in (stage for trial in trials for stage in trial.stages):
        if (other := stages.setdefault(stage.name, stage)) != stage and stage.job != "pretrain":
            raise ValueError(f"{stage.name}: wanted a folder for each, got {other.title} and {stage.title}: rename one")
    return list(stages.values())


def words(options: Mapping[str, Any]) -> tuple[str, ...]:
    """Options by name as words of a command line, ``config`` left out."""
    return tuple(
        word
        for name, value in options.items()
        if name != "config"
        for word in (f"--{name}", value if isinstance(value, str) else json.dumps(value))
    )


def pairs(study: StudyConfig) -> Iterator[tuple[str, str]]:
    """Settings and arms, in order."""
    return ((setting, arm) for setting in study.settings for arm in study.arms)


def images_of(study: StudyConfig, root: Path) -> Path:
    """The folder of train, val and test."""
    return root / "images" if study.job == "segment" else root


def _data(root: Path) -> tuple[str, ...]:
    return ("--data.source", "folder", "--data.root", str(root))


def _trial(study: StudyConfig, root: Path, setting: str, arm: str, seed: int, lr: float) -> Trial:
    config, data = study.arms[arm], _data(root)
    if study.job == "segment":
        data += ("--data.classes", str(root / CLASSES))
    common = {**study.pretrain, **study.settings[setting].pretrain}
    pretraining = _pretraining(common, config, _data(images_of(study, root)), seed)
    name = f"{_slug(setting)}.{_slug(arm)}.{lr:g}.{seed}"
    options = {"optim.lr": lr, **study.finetune, **study.settings[setting].finetune, **config.finetune}
    finetuning = Stage(
        name, study.job, f"{arm}, {setting}, rate {lr:g}, seed {seed}", (*data, *words(options)),
        pretraining[0].name if pretraining else None, required=True, seed=seed, recipe=options.get("config"),
    )  # fmt: skip
    return Trial(setting, arm, seed, lr, (*pretraining, finetuning))


def _pretraining(common: Mapping[str, Any], arm: ArmConfig, data: tuple[str, ...], seed: int) -> tuple[Stage, ...]:
    """Named by its options, so that arms and settings share it and a study with more of them finds it."""
    if arm.pretrain is None:
        return ()
    options = {**common, **arm.pretrain}
    name = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:8]
    title = " ".join(map(str, ("pretraining", *words(arm.pretrain), "seed", seed)))
    recipe = options.get("config")
    return (
        Stage(
            f"pretrain.{name}.{seed}", "pretrain", title, (*data, *words(options)), None, True, 1.0, seed, recipe
        ),
    )  # fmt: skip


def _slug(title: str) -> str:
    return "-".join("".join(char if char.isalnum() else " " for char in title.lower()).split())
