"""docs/method.md against the code: its numbers, its options, and its three tables of hyper-parameters."""

import contextlib
import io
import re
from functools import cache
from typing import Any

import pytest
import yaml
from conftest import ROOT

from sparsemae.cli import main

# All that this file knows of the package: the names of jobs and recipes, and what `--print_config` and `plan` print.
STAGES = ("pretrain", "finetune", "segment")
PAGE = (ROOT / "docs/method.md").read_text()


def find(pattern: str, text: str) -> str:
    """The first group of a pattern that must be there; N in it is a number with commas."""
    found = re.search(pattern.replace("N", r"[\d,]+"), text, re.MULTILINE)
    assert found is not None, pattern
    return found[1]


def printed(*argv: str) -> str:
    """What a command prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main(argv)
    return out.getvalue()


@cache
def resolved(recipe: str) -> dict[str, Any]:
    """Every option of a recipe by its dotted name, defaults included."""
    job = recipe.partition("_")[0]
    options: dict[str, Any] = {}
    for name, value in yaml.safe_load(printed(job, "--config", recipe, "--print_config")).items():
        grouped = isinstance(value, dict)
        options |= {f"{name}.{key}": entry for key, entry in value.items()} if grouped else {name: value}
    return options


@cache
def plan(recipe: str) -> dict[str, dict[str, tuple[str, str]]]:
    """(all, kept) as `sparsemae plan` prints them: of "parameters", and of the parts of each forward by its title."""
    text = printed("plan", recipe)
    total, kept, whole, others = (
        find(pattern, text) for pattern in ("^parameters +(N)", ": (N) of N sparse", " of (N) sparse", "all (N) others")
    )
    parameters = {"sparse weights": (whole, kept), "others": (others, others)}
    parameters["encoder"] = (total, find("^kept +(N)", text))
    found = {"parameters": parameters}
    for title, parts in re.findall(r"^multiply-adds +(.*), per image: .*\n((?:  .*\n)+)", text, re.MULTILINE):
        rows = re.findall(r"^  (\S.*?) +([\d.]+) G +([\d.]+) G", parts, re.MULTILINE)
        found[title] = {part: (dense, kept) for part, dense, kept in rows}
    return found


def table(header: str) -> list[list[str]]:
    """Cells of the rows of the page's table that begins with that header."""
    block = find(rf"^\| {header} \|.*\n\|[-| :]+\|\n((?:\|.*\n)+)", PAGE)
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in block.splitlines()]


def ticked(cell: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", cell)


def test_the_page_shows_the_numbers_of_the_method() -> None:
    assert [row[1:] for row in table("parameters")[::2]] == [
        ["84,934,656", "5,308,416", "10,616,832"],
        ["85,798,656", "6,172,416", "11,480,832"],
    ]


@pytest.mark.slow
def test_parameters_and_multiply_adds_are_what_the_code_counts() -> None:
    check_counts("pretrain", {"sparse weights", "others", "encoder"}, {"encoder", "decoder"}, 3 + 6)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "parameters", "forwards", "rows"), [
    ("finetune", {"with a head of 1,000 classes"}, set(), 1),
    ("segment", set(), {"segmentation encoder and pyramid", "segmentation head"}, 2),
])  # fmt: skip
@pytest.mark.holds_only
def test_parameters_and_multiply_adds_of_stage_2(
    stage: str, parameters: set[str], forwards: set[str], rows: int
) -> None:
    check_counts(stage, parameters, forwards, rows)


def check_counts(stage: str, parameters: set[str], forwards: set[str], rows: int) -> None:
    """Compare the page's rows of these names with the plans of a stage's two recipes."""
    tiny, small = plan(f"{stage}_t"), plan(f"{stage}_s")
    checked = 0
    for name, *shown in table("parameters"):
        if name in parameters:
            part = "encoder" if name.startswith("with") else name
            assert shown == [*tiny["parameters"][part], small["parameters"][part][1]], name
            checked += 1
    for name, tokens, *shown in table("multiply-adds"):
        forward, part = name.split(": ")
        if forward in forwards:
            words = forward.removeprefix("segmentation ")
            title = next(title for title in tiny if words in title and f" {tokens} tokens" in title)
            assert shown == [*tiny[title][part], small[title][part][1]], name
            checked += 1
    assert checked == rows


def test_the_hand_count_is_the_codes() -> None:
    by_hand = {"sparse linear": 197 * 84_934_656, "attention": 12 * 2 * 197**2 * 768, "patch embedding": 196 * 768**2}
    shown = {row[0].removeprefix("encoder: "): row[2] for row in table("multiply-adds") if row[1] == "197"}
    assert {part: f"{count / 1e9:.3f}" for part, count in by_hand.items()} == {part: shown[part] for part in by_hand}


def test_options_that_the_page_names_are_there() -> None:
    options = {name for stage in STAGES for name in resolved(f"{stage}_t")}
    groups = {name.split(".")[0] for name in options if "." in name}
    named = {word for word in ticked(PAGE) if re.fullmatch(r"[a-z_]+\.\w+", word) and word.split(".")[0] in groups}
    assert named <= options, named - options
    assert len(named) > 40


@pytest.mark.parametrize(("number", "stage", "rows"), [(1, "pretrain", 17), (2, "finetune", 19), (3, "segment", 13)])
def test_the_three_tables_are_the_recipes(number: int, stage: str, rows: int) -> None:
    section = find(rf"^### Table {number}: .*`{stage}_t` and `{stage}_s`\n\n((?:\|.*\n)+)", PAGE)
    _, _, *lines = section.splitlines()
    assert len(lines) == rows
    for line in lines:
        option, tiny, small = ticked(line)
        for recipe, value in ((f"{stage}_t", tiny), (f"{stage}_s", small)):
            assert resolved(recipe)[option] == yaml.safe_load(value), (recipe, line)


def test_open_points_show_what_the_recipes_have() -> None:
    """A setting's value is that of the job named in brackets, or else of every job that has it."""
    for point, setting, have, _ in table("open point"):
        named = [word for word in ticked(setting) if not word.startswith("{")]
        values = [yaml.safe_load(value) for value in ticked(have)]
        assert len(named) == len(values) > 0, point
        stages = [stage for stage in STAGES if f"({stage})" in setting] or STAGES
        for option, value in zip(named, values, strict=True):
            got = [resolved(f"{stage}_t")[option] for stage in stages if option in resolved(f"{stage}_t")]
            assert got, f"{point}: no job has {option}"
            assert all(entry == value for entry in got), (point, option, got)


def test_every_mark_has_its_source() -> None:
    sources = {row[0] for row in table("arXiv")}
    marked = {number for mark in re.findall(r"\*\*\[K ([^*]+)\]\*\*", PAGE) for number in mark.split(", ")}
    assert marked - {"mmseg"} == sources


def test_the_citation_names_the_paper_and_the_software() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    paper = citation["references"][0]
    assert paper["doi"] in PAGE
    assert paper["title"] in PAGE
    assert len(paper["authors"]) == 9
