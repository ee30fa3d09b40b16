"""A study's page: tables, paired differences, pictures, and what may be concluded."""

import re
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator

from sparsemae.files import replacing, write_atomic
from sparsemae.options import StudyConfig
from sparsemae.study.plan import seeds_of
from sparsemae.study.statistics import Paired

Rows = list[dict[str, Any]]
FIGURES = {"finetune": "top-1", "segment": "mIoU"}
"""What networks are compared by."""
LEGEND = (
    "± s.e.: the standard error of the mean over seeds. Parameters are those of the whole network: kept at the end, "
    "and in training. Multiply-adds: of one image, with the kept weights. Replaced: of the places that a sparse layer "
    "keeps, those that it did not keep when finetuning began."
)
MACHINE = ("processor", "torch", "threads")
"""Of a result: what both of a pair have in common."""


def write_page(config: StudyConfig, tried: Rows, tested: Rows, path: Path) -> None:
    """Write the page, and beside it one picture for each setting.

    Args:
        tried: by which the learning rates are chosen.
        tested: on the test images, at the rates that were chosen.

    Raises:
        ValueError: none was.
    """
    if not tested and config.seeds:
        raise ValueError(f"{config.out}: wanted a study with figures on its test images, got none")
    text = [_introduction(config, [*tried, *(row for row in tested if row not in tried)])]
    for number, setting in enumerate(config.settings):
        text.append(f"## {_shown(setting)}\n")
        if arms := _by_arm(config, tested, setting):
            picture = path.with_name(f"{path.stem}-{number}.png")
            _draw(arms, picture, FIGURES[config.job])
            text.append(_section(config, arms, picture.name))
        if here := _by_arm(config, tried, setting):
            text.append(_choice(config, here))
    write_atomic(path, "\n".join(text))


def _by_arm(config: StudyConfig, rows: Rows, setting: str) -> dict[str, Rows]:
    """The trials of a setting, in the order of the study's arms, each arm's by seed."""
    here = sorted((row for row in rows if row["setting"] == setting), key=lambda row: row["seed"])
    arms = {arm: [row for row in here if row["arm"] == arm] for arm in config.arms}
    return {arm: found for arm, found in arms.items() if found}


def _choice(config: StudyConfig, tried: dict[str, Rows]) -> str:
    """How the learning rates were chosen: a table of figures on held-out images, at all seeds of the choice."""
    rates, seeds = sorted({*config.learning_rates}), config.selection_seeds
    first, best = next(iter(config.arms)), dict[str, Rows]()
    lines = [
        f"By learning rate, {FIGURES[config.job]} on held-out images, means of {_seeds(seeds)}; and {_shown(first)} "
        "minus each arm, each at its best rate:\n",
        f"| arm | {' | '.join(f'{rate:g}' for rate in rates)} | difference | ± s.e. |",
        "|---|" + "---:|" * (len(rates) + 2),
    ]
    for arm, found in tried.items():
        by_rate = {rate: [row for row in found if row["lr"] == rate] for rate in rates}
        means = {rate: fmean(row["val"] for row in some) for rate, some in by_rate.items() if len(some) == seeds}
        best[arm] = by_rate[max(means, key=lambda rate: means[rate])] if len(means) == len(rates) else []
        pair = _paired(best.get(first, []), best[arm], "val")
        error = f"{pair.error:.2f}" if len(pair.differences) > 1 else ""
        told = f"{pair.mean:+.2f} | {error}" if arm != first and pair.differences else " | "
        cells = (f"{100 * means[rate]:.2f}" if rate in means else "" for rate in rates)
        lines.append(f"| {_shown(arm)} | {' | '.join(cells)} | {told} |")
    return "\n".join([*lines, ""])


def _shown(name: str) -> str:
    """As a cell of a table shows it: one line, without its signs' meaning to Markdown."""
    return re.sub(r"[|*_`<\[\]~]", r"\\\g<0>", " ".join(name.split()))


def _seeds(count: int) -> str:
    return f"{count} seed{'s' * (count > 1)}"


def _introduction(config: StudyConfig, rows: Rows) -> str:
    machines = {f"{row['processor']}, torch {row['torch']}, {row['threads']} thread" for row in rows}
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    rates = ", ".join(f"{rate:g}" for rate in config.learning_rates)
    chosen = (
        f"Learning rates of finetuning ({rates}) are chosen for each arm and setting by the mean {FIGURES[config.job]} "
        f"on held-out images at {_seeds(config.selection_seeds)}"
        if len(config.learning_rates) > 1
        else f"The learning rate of finetuning is {rates} for all arms; it was not chosen here"
    )
    figures = (
        "figures are of the test images, which nothing is chosen by, and of held-out ones where that is said, at all "
        "seeds of pretraining and finetuning. Differences are paired by seed, on the same processor; an order is "
        "claimed only where the 95 % t-interval of the paired difference excludes 0."
    )
    return (
        f"# Study\n\n{chosen}; {figures if config.seeds else 'there are no figures of test images.'}\n\n"
        f"{len(rows)} finetunings on {'; '.join(sorted(machines))}. Commits: {commits}. Each line of results.jsonl "
        "holds the commands that made it.\n"
    )


def _section(config: StudyConfig, arms: dict[str, Rows], picture: str) -> str:
    first, rates = next(iter(config.arms)), config.learning_rates
    edges = {min(rates): " ↓", max(rates): " ↑"} if len(rates) > 1 else {}
    table = [
        f"| arm | {FIGURES[config.job]} | ± s.e. | seeds | held-out | parameters kept | in training | multiply-adds | "
        "rate | replaced |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for arm, found in arms.items():
        scores = [100 * row["test"] for row in found]
        error = f"{stdev(scores) / len(scores) ** 0.5:.2f}" if len(scores) > 1 else ""
        one, held_out = found[0], 100 * fmean(row["val"] for row in found)
        replaced = f"{fmean(map(_replaced, found)):.0%}" if one["topology"] else ""
        rate = f"{one['lr']:g}{edges.get(one['lr'], '')}"
        table.append(
            f"| {_shown(arm)} | {fmean(scores):.2f} | {error} | {len(scores)} | {held_out:.2f} | {one['kept']:,} | "
            f"{one['total']:,} | {one['multiply_adds'] / 1e6:.2f} M | {rate} | {replaced} |"
        )
    marked = any(found[0]["lr"] in edges for found in arms.values())
    lines = [
        *table,
        "",
        LEGEND + " ↓ ↑: at an edge of the rates tried, so that the arm may be better still." * marked,
        "",
    ]
    if first in arms and len(arms) > 1:
        lines += [
            f"{_shown(first)} minus each other arm, points of {FIGURES[config.job]}:\n",
            "| against | difference | ± s.e. | 95 % interval |",
        ]
        lines += ["|---|---:|---:|---:|"]
        compared = {arm: _paired(arms[first], arms.get(arm, []), "test") for arm in config.arms if arm != first}
        for arm, pair in compared.items():
            if pair.differences:
                low, high = pair.interval
                told = f"{pair.error:.2f} | {low:+.2f} to {high:+.2f}" if len(pair.differences) > 1 else " | "
                lines.append(f"| {_shown(arm)} | {pair.mean:+.2f} | {told} |")
        lines += [
            "",
            _conclusion(config, first, compared),
            "",
            f"![accuracy against size]({picture})",
            "",
        ]
    return "\n".join(lines)


def _replaced(row: dict[str, Any]) -> float:
    """Share of the kept places of sparse layers that others had when finetuning began."""
    kept = row["kept"] - (row["total"] - row["sparse_weights"])
    entries = row["topology"][-1][2]  # of the masks, that differ: two for each place
    return float(entries / 2 / kept)


def _paired(ours: Rows, theirs: Rows, figure: str) -> Paired:
    """By test or val, of seeds whose two trials ran on the same processor, with as many threads and the same torch."""
    where = {row["seed"]: [row[key] for key in MACHINE] for row in ours}
    same = [row for row in theirs if where.get(row["seed"]) == [row[key] for key in MACHINE]]
    return Paired.of({row["seed"]: row[figure] for row in ours}, {row["seed"]: row[figure] for row in same})


def _conclusion(config: StudyConfig, first: str, compared: dict[str, Paired]) -> str:
    """An order is claimed once all pairs are there, lest one look until it is."""
    orders = {
        arm: pair.order if 1 < len(pair.differences) == min(seeds_of(config, first), seeds_of(config, arm)) else None
        for arm, pair in compared.items()
    }
    words = {
        1: "better than",
        -1: "worse than",
        0: "not told apart from",
        None: "not yet compared at enough seeds with",
    }
    said = {word: ", ".join(_shown(arm) for arm in orders if orders[arm] == order) for order, word in words.items()}
    return "; ".join(f"**{_shown(first)}** is {word} {arms}" for word, arms in said.items() if arms) + "."


def _draw(arms: dict[str, Rows], path: Path, what: str) -> None:
    """On the test images against kept parameters and multiply-adds; on held-out ones over epochs, if of several."""
    several = any(len(row["curve"]) > 1 for found in arms.values() for row in found)
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    *curves, kept, multiply_adds = figure.subplots(1, 2 + several)
    colors: Any = colormaps["tab20"].colors  # type: ignore[attr-defined]
    for axis in (*curves, kept, multiply_adds):
        axis.set_prop_cycle(color=[*colors[::2], *colors[1::2]])
    for arm, found in arms.items():
        _scatter(kept, found, "kept", arm)
        _scatter(multiply_adds, found, "multiply_adds", None)
        for axis in curves:
            _curve(axis, found)
    for axis in curves:
        axis.set(xlabel="epoch of finetuning", ylabel=f"{what} on held-out images, %")
    kept.set(xlabel="parameters kept", ylabel=f"{what} on test images, %")
    multiply_adds.set(xlabel="multiply-adds kept, per image")
    for axis in (kept, multiply_adds):
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(EngFormatter())
        axis.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axis.xaxis.set_minor_formatter(EngFormatter())
    for text in figure.legend(loc="outside right center", fontsize=8).get_texts():
        text.set_parse_math(False)  # an arm may be called anything
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def _curve(axis: Any, found: Rows) -> None:
    epochs = [epoch for epoch, _ in found[0]["curve"]]
    means = [100 * fmean(values) for values in zip(*([v for _, v in row["curve"]] for row in found), strict=False)]
    axis.plot(epochs[: len(means)], means, marker="o", markersize=3)


def _scatter(axis: Any, found: Rows, key: str, arm: str | None) -> None:
    scores = [100 * row["test"] for row in found]
    spread = stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else 0.0
    axis.errorbar([found[0][key]], [fmean(scores)], [spread], fmt="o", capsize=3, label=arm)
