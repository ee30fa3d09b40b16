"""A study: what it trains, how it chooses, what it claims; and a small one to its end, resumed."""

import json
import math
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from PIL import Image
from rich.console import Console

from sparsemae.cli import main
from sparsemae.config import read_config
from sparsemae.options import ArmConfig, FinetuneConfig, PretrainConfig, SettingConfig, StudyConfig
from sparsemae.runtime import native
from sparsemae.study.page import _replaced, write_page
from sparsemae.study.plan import choose, final, pairs, selection, stages_of
from sparsemae.study.results import Results, _options, _recipes, digest
from sparsemae.study.stages import Stage, run_stages
from sparsemae.study.statistics import T95, Paired

IMAGES = Path("images")
STUDY = StudyConfig(
    arms={
        "ours": ArmConfig(pretrain={}),
        "late": ArmConfig(pretrain={"sparse.pattern": "dense"}, seeds=3),
        "one-shot": ArmConfig(pretrain={"sparse.pattern": "dense"}, finetune={"sparse.mask": "fixed"}, seeds=3),
        "scratch": ArmConfig(),
    },
    settings={"few": SettingConfig(finetune={"data.train_images": 100}), "all": SettingConfig()},
    learning_rates=[1e-3, 2e-3],
)


def test_quantiles_are_students() -> None:
    assert [float(scipy.stats.t.ppf(0.975, degrees)) for degrees in range(1, len(T95) + 1)] == pytest.approx(
        list(T95), abs=5e-4
    )


def test_the_paired_difference_is_scipys() -> None:
    ours, theirs = np.random.default_rng(0).normal(0.8, 0.01, (2, 5))
    pair = Paired.of(dict(enumerate(ours)), dict(enumerate(theirs)) | {7: 0.0})
    reference = scipy.stats.ttest_rel(100 * ours, 100 * theirs)
    assert pair.mean == pytest.approx(100 * (ours - theirs).mean())
    assert pair.mean / pair.error == pytest.approx(reference.statistic)
    assert pair.interval == pytest.approx(tuple(reference.confidence_interval()), abs=1e-3)


@pytest.mark.parametrize(("differences", "order"), [([2, 3, 4], 1), ([-2, -3, -4], -1), ([2, 1, 6], 0), ([9], 0)])
def test_an_order_is_claimed_only_where_the_interval_excludes_0(differences: list[float], order: int) -> None:
    assert Paired(differences).order == order


def test_encoders_are_shared_between_arms_and_settings() -> None:
    chosen = dict.fromkeys(((setting, arm) for setting in STUDY.settings for arm in STUDY.arms), 1e-3)
    stages = stages_of(final(STUDY, IMAGES, chosen))
    assert sum(stage.job == "pretrain" for stage in stages) == 5 + 3, "ours at five seeds, the dense one at three"
    assert sum(stage.job == "finetune" for stage in stages) == 2 * (5 + 3 + 3 + 5)
    names = [stage.name for stage in stages]
    assert len(set(names)) == len(names)
    assert {stage.init for stage in stages} - {None} <= set(names)
    assert [stage.job for stage in stages[:4]] == ["pretrain", "finetune"] * 2, "the first figures come early"
    tried = {stage.name for stage in stages_of(selection(STUDY, IMAGES))}
    assert len(tried & set(names)) == 2 * 4 * 2 + 4, "what was tried at the chosen rate is not trained again"


@pytest.mark.slow
def test_every_stage_is_a_command_that_parses(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    monkeypatch.setattr("sparsemae.study.command._write_embedded", lambda config, root: written.append(root))
    words = ["study", "--config", "study_quick", "--out", str(tmp_path), "--print_commands"]
    main([*words, "shell"])
    assert written == [tmp_path / "images"], "which the commands read"
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    kinds: dict[str, Any] = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}
    configs = [read_config(kinds[job], words) for _, job, *words in lines]
    study = read_config(StudyConfig, ["--config", "study_quick"])
    assert len(configs) == 4 * 3 + 7 * 3 * 2
    assert {config.seed for config in configs} == {0, 1, 2}
    assert {c.optim.lr for c in configs if c.task == "classify"} == set(study.learning_rates)
    main([*words, "slurm"])
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"pretrain=$(sbatch --parsable {tmp_path}/pretrain.sh)"
    assert second == f"finetune=$(sbatch --parsable --dependency=afterok:$pretrain {tmp_path}/finetune.sh)"
    for job, count in (("pretrain", 12), ("finetune", 42)):
        script = tmp_path / f"{job}.sh"
        assert f"#SBATCH --array=0-{count - 1}\n" in script.read_text()
        told = [
            subprocess.run(
                ["bash", "-c", f"sparsemae() {{ printf '%s\\n' \"$@\"; }}; . {shlex.quote(str(script))}"],
                env={"SLURM_ARRAY_TASK_ID": str(task)}, capture_output=True, text=True, check=True,
            ).stdout.splitlines()
            for task in (0, count - 1, count)
        ]  # fmt: skip
        of_job = [words for _, *words in lines if words[0] == job]
        assert told == [of_job[0], of_job[-1], []]


@pytest.mark.holds("better.5")
def test_the_test_images_choose_nothing() -> None:
    rows = [
        {"setting": trial.setting, "arm": trial.arm, "seed": trial.seed, "lr": trial.lr,
         "val": 0.5 + (trial.lr == 2e-3) * (trial.arm == "ours"), "test": 1 - (trial.lr == 2e-3)}
        for trial in selection(STUDY, IMAGES)
    ]  # fmt: skip
    chosen = choose(STUDY, rows)
    assert {lr for (_, arm), lr in chosen.items() if arm == "ours"} == {2e-3}
    assert {lr for (_, arm), lr in chosen.items() if arm != "ours"} == {1e-3}, "of equal ones the lowest"
    assert choose(STUDY, [row | {"test": math.nan} for row in rows]) == chosen
    assert choose(STUDY, rows[1:]).keys() == chosen.keys() - {("few", "ours")}, "not before all were tried"
    assert set(choose(replace(STUDY, learning_rates=[3e-3]), []).values()) == {3e-3}


SMALL = {
    "model.args": {"patch_size": 7, "embed_dim": 32, "depth": 1, "num_heads": 1},
    "trainer.epochs": 2, "trainer.global_batch": 10, "optim.warmup_epochs": 0, "trainer.evaluate_every_epochs": 1,
}  # fmt: skip


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    """Words of a study of two arms, on images whose brightness is their class."""
    random = np.random.default_rng(0)
    for split, count in {"train": 20, "val": 10, "test": 10}.items():
        for label, name in enumerate(("dark", "light")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = (random.random((28, 28)) * 60 + 130 * label).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    recipe = tmp_path / "small.yaml"
    content = {
        "out": str(tmp_path / "study"), "root": str(tmp_path / "images"), "seeds": 2, "learning_rates": [1e-3, 1e-2],
        "pretrain": {"config": "demo_pretrain", **SMALL}, "finetune": {"config": "demo_finetune", **SMALL},
        "settings": {"all labels": {}}, "arms": {"ours": {"pretrain": {}}, "scratch": {}},
    }  # fmt: skip
    recipe.write_text(json.dumps(content))
    return ["study", "--config", str(recipe), "--at_a_time", "2"]


@pytest.mark.slow
@pytest.mark.holds("better.1")
@pytest.mark.holds_only
def test_a_study_to_its_end_and_a_deleted_result_again(small: list[str], tmp_path: Path) -> None:
    main(small)
    out = tmp_path / "study"
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 2 * 2, "two arms, two rates, two seeds"
    assert sum(row["test"] is not None for row in rows) == 2 * 2, "of the chosen rates alone"
    page = (out / "study.md").read_text()
    assert "| scratch | " in page.split("minus each other arm")[1]
    assert (out / "study-0.png").is_file()
    by_rate = page.split("By learning rate, top-1 on held-out images")[1]
    mean = sum(row["val"] for row in rows if row["arm"] == "scratch" and row["lr"] == 1e-3) / 2
    assert f"| scratch | {100 * mean:.2f} | " in by_rate

    lost = next(row for row in rows if row["test"] is not None)
    (out / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows if row is not lost))
    run = next(words[words.index("--out") + 1] for words in reversed(lost["commands"]))
    shutil.rmtree(run)
    main(small)
    again = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    found = next(row for row in again if all(row[key] == lost[key] for key in ("setting", "arm", "seed", "lr")))
    assert {**found, "seconds": 0} == {**lost, "seconds": 0}
    assert len(again) == len(rows)
    assert found["processor"] == native.processor_name()

    machine = json.loads((tmp_path / run / "environment.json").read_text()) | {"processor": "another", "commit": "abc"}
    (tmp_path / run / "environment.json").write_text(json.dumps(machine))
    (out / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in again if row is not found))
    main(small)
    collected = json.loads((out / "results.jsonl").read_text().splitlines()[-1])
    assert {**collected, "seconds": 0} == {**found, "seconds": 0, "processor": "another", "commit": "abc"}


@pytest.mark.holds("held.1")
def test_an_arm_may_be_called_anything(tmp_path: Path) -> None:
    r"""``$\frac{`` in a name is shown, not read as a formula, which would end the report."""
    name = r"half $\frac{ of $"
    row = {
        "setting": "all", "arm": name, "seed": 0, "lr": 1e-3, "val": 0.5, "test": 0.5, "kept": 10, "total": 20,
        "sparse_weights": 8, "multiply_adds": 100, "curve": [[1, 0.4], [2, 0.5]], "topology": [],
        "processor": "one", "torch": "2", "threads": 1, "commit": "abc",
    }  # fmt: skip
    study = StudyConfig(arms={name: ArmConfig()}, settings={"all": SettingConfig()}, learning_rates=[1e-3])
    write_page(study, [], [row], tmp_path / "study.md")
    assert f"| {name} | 50.00 |" in (tmp_path / "study.md").read_text()
    assert (tmp_path / "study-0.png").stat().st_size > 0


def _rows(words: list[str], out: Path) -> list[dict[str, Any]]:
    """Lines as trainings leave them, without training: at the second rate all is better, and the first arm best."""
    study = read_config(StudyConfig, words[1:])
    return [
        {"setting": trial.setting, "arm": trial.arm, "seed": trial.seed, "lr": trial.lr,
         "val": 0.5 + trial.lr, "test": 0.2 + 50 * trial.lr + 0.1 * (trial.arm == "ours") + 0.01 * trial.seed,
         "kept": 10, "total": 20, "sparse_weights": 8, "multiply_adds": 100, "curve": [[1, 0.4], [2, 0.5]],
         "topology": [], "processor": "one", "torch": "2", "threads": 1, "commit": "abc",
         "commands": trial.commands(out)}
        for trial in selection(replace(study, selection_seeds=4), Path(str(study.root)))
    ]  # fmt: skip


def _report(words: list[str], rows: list[dict[str, Any]], tmp_path: Path) -> str:
    (tmp_path / "study").mkdir(exist_ok=True)
    (tmp_path / "study" / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparsemae.study.page._draw", lambda *_: None)  # takes longer than all the rest
        main([*words, "--report", str(tmp_path / "page.md")])
    return (tmp_path / "page.md").read_text()


@pytest.mark.holds("better.5")
def test_the_page_is_of_this_studys_trials_alone(small: list[str], tmp_path: Path) -> None:
    """Figures of a rate that was the best of a narrower grid stay in the results, and so do those of other seeds."""
    page = _report(small, _rows(small, tmp_path / "study"), tmp_path)
    assert "| ours | 80.50 | 0.50 | 2 | 51.00 |" in page
    assert "8 finetunings" in page
    assert "**ours** is better than scratch." in page
    fresh = _report([*small, "--first_seed", "2"], _rows(small, tmp_path / "study"), tmp_path)
    assert "| ours | 82.50 | 0.50 | 2 |" in fresh
    one = _report([*small, "--learning_rates", "[0.001]"], _rows(small, tmp_path / "study"), tmp_path)
    assert "The learning rate of finetuning is 0.001 for all arms; it was not chosen here" in one
    assert "by learning rate" not in one


def test_no_order_is_claimed_before_all_pairs_are_there(small: list[str], tmp_path: Path) -> None:
    small = [*small, "--seeds", "4"]
    rows = _rows(small, tmp_path / "study")
    rows[-1]["test"] = None
    assert "**ours** is not yet compared at enough seeds with scratch." in _report(small, rows, tmp_path)
    for machine in ({"processor": "another"}, {"torch": "another"}, {"threads": 2}):
        other = [*rows[:-1], rows[-1] | {"test": 0.7} | machine]
        assert "**ours** is not yet compared at enough seeds with scratch." in _report(small, other, tmp_path)
    rows[-1] = other[-1]
    one = _report([*small, "--seeds", "1"], rows, tmp_path)
    assert re.search(r"^\| scratch \| [+-][\d.]+ \|  \|  \|$", one, re.MULTILINE)
    assert "inf" not in one, "an error of one pair is none"
    assert "**ours** is not yet compared at enough seeds with scratch." in one
    half = _report(small, rows[:6] + rows[8:9], tmp_path)
    assert "| scratch | 55" not in half, "no rate of it is chosen yet"
    assert "| scratch |  |  |  |  |" in half


def test_a_result_of_other_options_is_not_taken(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = _rows(small, Path("before/it/was/moved"))
    assert "80.50" in _report(small, rows, tmp_path)
    with pytest.raises(SystemExit):
        _report([*small, "--settings", '{"all labels": {"finetune": {"erasing": 0.5}}}'], rows, tmp_path)
    assert "ours, all labels, rate 0.001, seed 0: made with other options (finetune --erasing 0.5)" in (
        capsys.readouterr().err
    )
    recipe = tmp_path / "own.yaml"
    recipe.write_text("mixup: 0.1  # a comment tells nothing\n")
    own = [*small, "--finetune.config", str(recipe)]
    rows = [row | {"recipes": _recipes(row["commands"])} for row in _rows(own, tmp_path / "study")]
    recipe.write_text("mixup: 0.1\n")
    assert "80.50" in _report(own, rows, tmp_path)
    recipe.write_text("mixup: 0.2\n")
    with pytest.raises(SystemExit):
        _report(own, rows, tmp_path)
    assert f"rate 0.001, seed 0: made with other options (recipe {recipe})" in capsys.readouterr().err
    (tmp_path / "study" / "results.jsonl").write_text('{"setting": "al')
    with pytest.raises(SystemExit):
        main([*small, "--report", str(tmp_path / "page.md")])
    assert "results.jsonl: wanted a line of JSON for each result" in capsys.readouterr().err


def test_a_study_of_the_embedded_images_and_masks_may_be_moved() -> None:
    study = StudyConfig(job="segment", finetune={"config": "demo_segment"}, settings=STUDY.settings, arms=STUDY.arms)
    before, after = (
        final(study, Path(out) / "images", dict.fromkeys(pairs(study), 1e-3))[0].commands(Path(out)) for out in "ab"
    )
    assert before != after
    assert _options(before) == _options(after)


def test_embedded_images_of_another_job_are_not_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images" / "train").mkdir(parents=True)
    words = [
        "--job", "segment", "--finetune.config", "demo_segment", "--arms", '{"x": {}}', "--settings", '{"all": {}}',
    ]  # fmt: skip
    with pytest.raises(SystemExit):
        main(["study", "--out", str(tmp_path), *words])
    assert f"{tmp_path}/images: wanted images of a study with job segment" in capsys.readouterr().err


def test_what_was_replaced_is_counted_by_place() -> None:
    """12 of 96 places are kept, 3 of them others than at the start: 6 entries of the masks differ."""
    assert _replaced({"kept": 12 + 10, "total": 96 + 10, "sparse_weights": 96, "topology": [[1, 0.0, 6]]}) == 0.25


def test_two_studies_in_one_folder_keep_each_others_lines(small: list[str], tmp_path: Path) -> None:
    one, other = (Results(tmp_path / "results.jsonl") for _ in range(2))
    rows = _rows(small, tmp_path)
    one.put(rows[0])
    other.put(rows[1])
    assert Results(tmp_path / "results.jsonl").rows == rows[:2]


def test_results_of_images_that_have_changed_since_are_refused(small: list[str], tmp_path: Path) -> None:
    file = tmp_path / "train" / "cat" / "0.png"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"pixels")
    results, config = Results(tmp_path / "results.jsonl"), read_config(StudyConfig, small[1:])
    results.images = digest(tmp_path / "train")
    results.put(_rows(small, tmp_path)[0])
    (trial,) = [trial for trial in selection(config, Path(config.root or "")) if results.get(trial)]
    file.rename(file.with_name("1.png"))
    results.images = digest(tmp_path / "train")
    with pytest.raises(ValueError, match="made with other images, which have changed since: choose another --out"):
        results.get(trial)
    results.images = None  # a page is made without them
    assert results.get(trial)


def test_signs_of_markdown_in_a_name_are_shown(small: list[str], tmp_path: Path) -> None:
    row = _rows(small, tmp_path)[0] | {"arm": "a|b [c](d)\n*e*", "setting": "`f`"}
    study = StudyConfig(arms={row["arm"]: ArmConfig()}, settings={"`f`": SettingConfig()}, learning_rates=[1e-3])
    write_page(study, [], [row], tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert r"| a\|b \[c\](d) \*e\* | " in page
    assert r"## \`f\`" in page


def test_arms_have_folders_of_their_own_and_share_an_encoder_whatever_says_so() -> None:
    both = {"a b": ArmConfig(), "A-B!": ArmConfig(finetune={"erasing": 0.5})}
    study = replace(STUDY, arms=both, learning_rates=[1e-3])
    with pytest.raises(ValueError, match=r"few.a-b.0.001.0: wanted a folder for each, got a b, .* and A-B!, "):
        stages_of(final(study, IMAGES, dict.fromkeys(pairs(study), 1e-3)))
    alike = {"a": ArmConfig(pretrain={}), "b": ArmConfig(pretrain={"mask_ratio": 0.5})}
    study = replace(study, arms=alike, pretrain={"mask_ratio": 0.5}, seeds=1)
    stages = stages_of(final(study, IMAGES, dict.fromkeys(pairs(study), 1e-3)))
    assert [stage.job for stage in stages].count("pretrain") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--arms", '{"x": {"finetune": {"seed": 5}}}'], "x, all labels, rate 0.001, seed 0: seed: wanted the study's"),
        (["--arms", '{"x": {"finetune": {"optim.lr": 5}}}'], "optim.lr: wanted the study's own, 0.001, got 5"),
        (["--arms", '{"x": {"finetune": {"lr": 5}}}'], "optim.lr: wanted the study's own, 0.001, got 5"),
        (["--arms", '{"x": {"pretrain": {"mask_ration": 0}}}'], "pretraining --mask_ration 0 seed 0: "),
        (["--arms", '{"x": {"seeds": 0}}'], "seeds: wanted at least 1, got 0"),
        (["--arms", '{"x": {"finetune": {"teacher": "no/such"}}}'], "seed 0: teacher: no/such: no such file or folder"),
        (["--learning_rates", "[.nan]"], "learning_rates: wanted more than 0, got [nan]"),
        (["--learning_rates", "[]"], "learning_rates: wanted at least one, got none"),
    ],
)
def test_what_would_fail_or_deceive_is_refused_before_the_first_training(
    small: list[str], tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*small, *words])
    assert said in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


@pytest.mark.holds("better.5")
@pytest.mark.parametrize("split", ["val", "test"])
def test_a_root_without_held_out_or_test_images_is_refused(
    small: list[str], tmp_path: Path, split: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without ``val`` a training would take ``test`` for it, and so would the choice of the learning rate."""
    shutil.rmtree(tmp_path / "images" / split)
    with pytest.raises(SystemExit):
        main(small)
    assert f"wanted images in train, val and test, got none in {split}" in capsys.readouterr().err


def test_a_search_is_printed_too(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Which has no seeds but those of the choice."""
    main([*small, "--seeds", "0", "--print_commands", "shell"])
    assert len(capsys.readouterr().out.splitlines()) == 2 + 2 * 2 * 2


@pytest.mark.slow
def test_which_training_failed_is_said(tmp_path: Path) -> None:
    stage = Stage("name", "pretrain", "the title", ("--data.source", "folder", "--data.root", str(tmp_path / "no")))
    with pytest.raises(ValueError, match=r"the title: .*no.* \(its log: .*name.log\)"):
        run_stages([stage], tmp_path, 0, math.inf, Console(quiet=True), 1)


def test_a_report_of_nothing_is_refused(small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*small, "--report", str(tmp_path / "study.md")])
    assert "wanted a study with figures on its test images" in capsys.readouterr().err
    assert not (tmp_path / "study.md").exists()
