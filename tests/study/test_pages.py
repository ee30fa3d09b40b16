"""The studies in docs/study: each page is what its results say, and the verdicts are scipy's."""

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from conftest import ROOT, Figure

from sparsemae.cli import main

DOCS = ROOT / "docs" / "study"
PAGES = {
    "fashion": "study_fashion",
    "openclipart": "study_openclipart",
    "quick": "study_quick",
    "search": f"{DOCS}/search.yaml",
    "candidates": f"{DOCS}/candidates.yaml",
    "plus": f"{DOCS}/plus.yaml",
    "quick_plus": f"{DOCS}/quick_plus.yaml",
    "openclipart_plus": f"{DOCS}/openclipart_plus.yaml",
}
OURS, FIRST_SEEDS = "SparseMAE", (0, 1)
FIVE = ("dense MAE -> SR-STE", "small dense with MAE, equal kept parameters",
        "small dense with MAE, equal multiply-adds", "big dense with MAE")  # fmt: skip


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DOCS / name / "results.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("name", "recipe"), PAGES.items())
def test_a_page_is_made_of_the_results_beside_it(name: str, recipe: str, tmp_path: Path) -> None:
    page = tmp_path / f"{name}.md"
    main(["study", "--config", recipe, "--out", str(DOCS / name), "--report", str(page)])
    assert page.read_text() == (DOCS / page.name).read_text()


def test_the_spread_beside_the_demos_figures_is_the_quick_studys() -> None:
    by_arm: dict[str, list[float]] = defaultdict(list)
    for row in rows("quick"):
        if row["test"] is not None:
            by_arm[row["arm"]].append(100 * row["test"])
    spread = [np.std(scores, ddof=1) for scores in by_arm.values()]
    assert {len(scores) for scores in by_arm.values()} == {3}
    for file in ("README.md", "docs/results.md"):
        text = " ".join((ROOT / file).read_text().split())
        assert f"of three, an arm's figures spread by {min(spread):.1f} to {max(spread):.1f} points" in text


@pytest.mark.holds("better.2")
@pytest.mark.parametrize("name", ["fashion", "openclipart"])
def test_the_verdict_is_scipys(name: str, figure: Figure) -> None:
    """From the results alone: each arm's rate by two seeds on held-out images, then five pairs on test images."""
    by_rate: dict[str, dict[float, dict[int, Any]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows(name):
        by_rate[row["arm"]][row["lr"]][row["seed"]] = row
    scores, processors = {}, set()
    for arm in (OURS, *FIVE):
        tried = {lr: rows for lr, rows in by_rate[arm].items() if set(FIRST_SEEDS) <= set(rows)}
        best = max(sorted(tried), key=lambda lr: np.mean([tried[lr][seed]["val"] for seed in FIRST_SEEDS]))
        assert sorted(tried[best]) == [0, 1, 2, 3, 4]
        scores[arm] = 100 * np.array([tried[best][seed]["test"] for seed in range(5)])
        processors |= {row["processor"] for row in tried[best].values()}
    assert len(processors) == 1
    page, verdict = (DOCS / f"{name}.md").read_text(), {}
    for arm in FIVE:
        found = scipy.stats.ttest_rel(scores[OURS], scores[arm])
        low, high = found.confidence_interval(0.95)
        line = re.search(rf"^\| {re.escape(arm)} \| (\S+) \| \S+ \| (\S+) to (\S+) \|$", page, re.MULTILINE)
        mean = (scores[OURS] - scores[arm]).mean()
        assert line
        assert [float(cell) for cell in line.groups()] == pytest.approx([mean, low, high], abs=0.006)
        verdict[arm] = "better than" if low > 0 else "worse than" if high < 0 else "not told apart from"
        assert re.search(rf"is {verdict[arm]} [^;]*{re.escape(arm)}", page)
    figure(f"{name}: SparseMAE is {'; '.join(f'{word} {arm}' for arm, word in verdict.items())}")


@pytest.mark.holds("better.3")
def test_the_plus_recipe_is_a_point_better_on_fresh_seeds(figure: Figure) -> None:
    """Seeds that nothing was chosen by, on the same processor; and the term alone."""
    by_arm: dict[str, dict[int, float]] = defaultdict(dict)
    for row in rows("plus"):
        by_arm[row["arm"]][row["seed"]] = 100 * row["test"]
    earlier = {row["seed"] for name in ("fashion", "candidates") for row in rows(name)}
    assert len({(row["processor"], row["commit"]) for row in rows("plus")}) == 1
    for arm, least in (("best three together", 1.0), ("term decoupled", 0.0)):
        seeds = sorted(by_arm[arm])
        assert len(seeds) == 5
        assert not earlier & set(seeds)
        ours, papers = ([by_arm[name][seed] for seed in seeds] for name in (arm, OURS))
        found = scipy.stats.ttest_rel(ours, papers).confidence_interval(0.95)
        mean = np.mean(ours) - np.mean(papers)
        figure(f"{arm}: {mean:+.2f} points of top-1 ({found.low:+.2f} to {found.high:+.2f})")
        assert mean >= least
        assert found.low > 0
