"""What a person reads: short pages of help, the name that was meant, a bar that moves, a pipe that is closed."""

import os
import pty
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, Figure, tiny
from PIL import Image

from sparsemae.cli import main
from sparsemae.config import read_config
from sparsemae.jobs import JOBS, resolve


@pytest.mark.holds("own.5")
@pytest.mark.parametrize("job", JOBS)
def test_a_page_of_help_is_short_and_has_an_example(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("--help", "-h"):
        main([job, word])
        text = capsys.readouterr().out
        assert text.count("\n") <= 60
        assert max(map(len, text.splitlines())) <= 120
        assert f"sparsemae {job} --help-all" in text
        assert all(example in text for example in JOBS[job].examples)
    assert JOBS[job].examples
    for name in JOBS[job].common:
        assert re.search(
            rf"^  --\S*{re.escape(name.rpartition('.')[2].replace('_', '-'))}|--(batch|model)", text, re.MULTILINE
        )


@pytest.mark.holds("own.5")
@pytest.mark.parametrize("job", JOBS)
def test_the_examples_are_understood(job: str) -> None:
    """All of them; `test_the_examples_of_trainings_run` runs most."""
    for example in JOBS[job].examples:
        program, name, *words = shlex.split(example)
        assert (program, name) == ("sparsemae", job)
        if words[:1] == ["finetune"]:  # of a plan
            name, words = words[0], words[1 : words.index("--measure")]
        config: Any = read_config(resolve(JOBS[name].options), words if job != "study" else [])
        assert "--out" not in words or config.out == words[words.index("--out") + 1]


@pytest.mark.slow
@pytest.mark.holds("own.5")
def test_the_examples_of_trainings_run(
    tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a folder that has what they name, two steps long, of a small model; what follows a training follows it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "labels.csv").write_text(
        "".join(
            f"images/{split}/{name}/{i}.png,{name}\n"
            for split, count in (("train", 8), ("val", 3))
            for name in ("cat", "dog")
            for i in range(count)
        )
    )
    mask = np.zeros((40, 40), np.uint8)
    mask[:, 20:] = 1
    for split, count in (("train", 8), ("val", 2)):
        for kind in ("images", "masks"):
            (tmp_path / "scenes" / kind / split).mkdir(parents=True)
        for i in range(count):
            (tmp_path / f"scenes/images/{split}/{i}.png").write_bytes(
                (image_folder / f"train/cat/{i}.png").read_bytes()
            )
            Image.fromarray(mask).save(tmp_path / f"scenes/masks/{split}/{i}.png")
    (tmp_path / "scenes" / "classes.txt").write_text("left\nright\n")
    short = ["--trainer.max_steps=2", "--model.args={embed_dim: 32, depth: 4, num_heads: 2}", "--data.workers=0",
             "--trainer.accelerator=cpu", "--trainer.precision=fp32"]  # fmt: skip
    left_out = {"--init", "--config"}  # a download, and the paper's size
    for job in ("check", "pretrain", "finetune", "segment", "pack", "evaluate", "predict", "report"):
        for example in JOBS[job].examples:
            words = shlex.split(example)[1:]
            if left_out & set(words):
                continue
            more = {"segment": ["--out_indices", "[0, 1, 2, 3]"], "evaluate": ["--data.workers", "0"]}.get(job, [])
            main([*words, *(short if job in ("pretrain", "finetune", "segment") else []), *more])
    shown = capsys.readouterr()
    assert "next: sparsemae finetune images/ --data.exclude exclude.txt" in shown.out
    assert "k-NN vote by its features on " in shown.err
    assert (tmp_path / "runs/scenes/model.safetensors").is_file()


@pytest.mark.holds("own.5")
def test_the_name_that_was_meant(refused: Any) -> None:
    for words, meant in (
        (["finetune", "--data.sorce", "folder"], "--data.source"),
        (["finetune", "--epoch", "3"], "--epochs"),
        (["finetune", "--learning_rate", "3"], None),
        (["pretrain", "--trainer.mask_ratio=3"], "--mask_ratio"),
        (["segment", "--workers", "3"], "--data.workers"),
        (["check", "--write-exlude", "x"], "--write_exclude"),
    ):
        line = refused(*words)
        assert f"unrecognized arguments: --{words[1][2:].partition('=')[0].replace('-', '_')}" in line
        assert ("did you mean" in line) == (meant is not None)
        assert meant is None or f"(did you mean {meant}?)" in line
    assert "(did you mean finetune?)" in refused("finetun")


@pytest.mark.slow
@pytest.mark.holds("own.5")
def test_a_shell_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Any) -> None:
    """bash, by the script that is printed: commands, options and their short names, choices, files."""
    pytest.importorskip("shtab")
    main(["--completion", "bash"])
    (tmp_path / "complete").write_text(capsys.readouterr().out)
    (tmp_path / "photo.jpg").touch()
    wanted = {
        "fin": {"finetune"},
        "finetune --trainer.keep_": {"--trainer.keep_checkpoints"},
        "finetune --ep": {"--epochs"},
        "finetune --trainer.keep ": {"best", "last"},
        "finetune --keep ": {"best", "last"},
        "finetune pho": {"photo.jpg"},
        "predict photo.jpg pho": {"photo.jpg"},
        "pack photo.jpg --dtype ": {"bf16", "fp32", "int8"},
    }
    asked = "".join(
        f"COMP_WORDS=({' '.join(map(shlex.quote, words))}); COMP_CWORD={len(words) - 1}; COMPREPLY=()\n"
        f"_shtab_sparsemae sparsemae {words[-1] or repr('')} {words[-2]}; echo ${{COMPREPLY[*]}}\n"
        for words in (["sparsemae", *line.split(" ")] for line in wanted)
    )
    done = subprocess.run(
        ["bash", "-c", f". ./complete\n{asked}"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert [set(line.split()) for line in done.stdout.splitlines()] == list(wanted.values())
    assert "wanted bash, zsh" in refused("--completion", "sh")


@pytest.mark.slow
@pytest.mark.holds("own.5")
def test_a_bar_moves_from_the_first_step_and_knows_the_epochs(tmp_path: Path, figure: Figure) -> None:
    """On a terminal of its own, with a log line every hundred steps."""
    words = [*tiny("finetune", tmp_path / "run", "--trainer.log_every_steps", "100"), "--optim.warmup_epochs", "0"]
    master, terminal = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "sparsemae", *words], stderr=terminal, stdout=subprocess.DEVNULL, cwd=ROOT,
        env={**os.environ, "COLUMNS": "160", "TERM": "xterm"},
    ) as process:  # fmt: skip
        os.close(terminal)
        shown = b""
        while True:
            try:
                part = os.read(master, 4096)
            except OSError:  # what Linux gives when the last writer has closed it
                break
            if not part:
                break
            shown += part
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode(errors="replace"))
    assert process.returncode == 0, text
    seen = [line for line in re.split(r"[\r\n]+", text) if "finetuning" in line]
    steps = {int(step) for line in seen for step in re.findall(r"(\d+)/6", line)}
    assert 6 in steps
    assert min(steps - {0}) < 6
    assert any("epoch 3/3, loss" in line for line in seen), seen
    start = re.split(r"[\r\n]+", text[: text.index("finetuning")].strip())
    assert len(start) <= 10, start
    figure(f"{len(seen)} states of the bar, a start of {len(start)} lines")


@pytest.mark.slow
@pytest.mark.holds("own.5")
@pytest.mark.parametrize(
    ("words", "unbuffered"),
    [("--help", ""), ("--help", "1"), ("finetune --help", ""), ("finetune --help", "1"), ("predict --help-all", "")],
)
def test_an_output_that_takes_nothing(words: str, unbuffered: str) -> None:
    """A full disk is one line and status 2, a reader that has left is nothing; python has a buffer or none."""
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    program = f"{shlex.quote(sys.executable)} -m sparsemae {words}"
    for command, status, lines in (
        (f"{program} > /dev/full", 2, 1), (f"(sleep 0.3; {program}) | :; exit ${{PIPESTATUS[0]}}", 0, 0)
    ):  # fmt: skip
        done = subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, check=False, cwd=ROOT, env=environment
        )
        assert (done.returncode, done.stderr.count("\n")) == (status, lines), done.stderr


@pytest.mark.slow
@pytest.mark.holds("own.5")
def test_a_reader_that_leaves_ends_the_command_quietly(runs: Path, tmp_path: Path) -> None:
    """As ``sparsemae predict DIR | head -1``, and with more output than a pipe holds."""
    for i in range(40):
        Image.new("RGB", (28, 28), (i, 0, 0)).save(tmp_path / f"{i:02d}.png")
    program = f"{shlex.quote(sys.executable)} -m sparsemae predict {runs}/finetune {tmp_path}"
    command = f"{program} | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{tmp_path}/00.png: ")
    assert done.stdout.count("\n") == 1
