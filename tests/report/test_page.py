from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import tiny
from pages import Page

from sparsemae.cli import main
from sparsemae.report.page import write_page

EVIL = '<img src=x onerror="alert(1)"> & $x_1$ \udce9'


def made_run(folder: Path, record: dict[str, Any] | None = None, result: dict[str, Any] | None = None) -> Path:
    """A run's folder as it would be, with made-up logs."""
    folder.mkdir()
    rows = [{"step": i, "epoch": i / 10, "loss": 2 / (1 + i), "lr": 1e-3, "images_per_second": 9.0} for i in range(50)]
    rows += [{"step": 10 * i, "epoch": i, "top1": 0.1 * i, "top5": 0.9, "standard_error": 0.02} for i in range(1, 5)]
    moved = {"layers": {"blocks.0.attn.qkv": {"flip_rate": 0.1, "sad": 3}}, "total": {"flip_rate": 0.1, "sad": 3}}
    topology = [{"step": 10 * i, "epoch": i, **moved} for i in range(1, 5)]
    for name, lines in (("metrics", rows), ("topology", topology)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {"out": str(folder), "seed": 0, "model": {"name": "vit_tiny", "args": {}}, "sparse": {"pattern": "2:32"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "environment.json").write_text(json.dumps({"python": "3.11", "packages": {}}))
    for name, content in (("report.json", record), ("result.json", result)):
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    return folder


def record(classes: int, text: str, pictures: int = 1) -> dict[str, Any]:
    """What `collect` would have left, with a text of a user's wherever one may be."""
    one = {
        "picture": "data:image/png;base64,AAAA",
        "width": 28,
        "wide": False,
        "file": text,
        "title": text,
        "note": text,
    }
    headline = {"name": "Top-1 accuracy", "value": 0.5, "error": 0.01, "unit": "%", "about": text}
    counts = np.random.default_rng(0).integers(1, 9, (classes, classes))
    confusion = [[i, j, int(counts[i, j])] for i in range(classes) for j in range(classes)]
    return {
        "version": 1, "title": "finetuning", "layers": {"sparse": [[text, "2:32", 2, 32]], "dense": [[text, 5]]},
        "batch": [one] * pictures, "galleries": [{"title": text, "about": text, "pictures": [one] * pictures}],
        "images": int(counts.sum()), "headlines": [headline], "unit": "images", "palette": None,
        "class_names": [f"{text} {i}" for i in range(classes)], "confusion": confusion,
    }  # fmt: skip


def page_of(folder: Path) -> Page:
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert not page.open
    assert all(link.startswith("data:") for link in page.links), page.links
    assert not {"script", "iframe", "object", "onerror", "onload", "onclick"} & {*page.names}
    return page


@pytest.mark.slow
def test_two_runs_on_one_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = tmp_path / "one", tmp_path / "other <b>"
    main(tiny("pretrain", one, "--trainer.max_steps", "2"))
    main(tiny("pretrain", other, "--trainer.max_steps", "2", "--seed", "1"))
    with (one / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 3, "lo')  # the run goes on
    main(["report", str(one), str(other)])
    assert f"wrote {one / 'report.html'}" in capsys.readouterr().out
    page = page_of(one)
    assert page.tags.count("svg") == 5  # loss, rate, flips, SAD and speed, each over both
    assert str(other) in page.words
    settings = page.words[page.words.index("Settings that differ") : page.words.index("Machine and speed")]
    assert settings[1:4] == ["setting", str(one), str(other)]
    assert settings[4:] == ["out", str(one), str(other), "seed", "0", "1"]


@pytest.mark.parametrize("classes", [3, 30, 60])
def test_whatever_users_call_their_files_is_text(tmp_path: Path, classes: int) -> None:
    result = {"kept": 2.0, "notes": [f"warning: {EVIL}", EVIL], "test": None}
    run = made_run(tmp_path / "run <i>", record(classes, EVIL), result)
    write_page([run])
    page, shown = page_of(run), EVIL.encode(errors="replace").decode()
    assert page.tags.count("img") == 2
    assert sum(shown in word for word in page.words) > 8
    assert "run <i>" in page.words
    assert f"warning: {shown}" in page.words


@pytest.mark.slow
def test_a_page_of_a_thousand_classes_stays_small(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", record(1000, "class", 24))
    write_page([run])
    assert (run / "report.html").stat().st_size < 600_000
    assert "Most confused" in page_of(run).words


def test_a_run_of_before_has_its_logs_shown_and_says_what_it_lacks(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run")
    write_page([run])
    page = page_of(run)
    assert page.tags.count("svg") == 3 + 3 + 1  # curves, mask, speed
    assert any("no report.json" in word for word in page.words)
    assert "Confusion matrix" not in page.words
    assert page.words[page.words.index("top-1") + 1] == "40.0"


def test_a_run_that_goes_on_is_not_shown_with_the_pictures_of_before(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", record(3, "a") | {"step": 40}, {"kept": 3.0, "notes": ["of before"], "test": None})
    write_page([run])
    assert "Confusion matrix" in page_of(run).words
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 50, "epoch": 5.0, "loss": 1.0}\n')
    write_page([run])
    page = page_of(run)
    assert "Confusion matrix" not in page.words
    assert "of before" not in page.words


def test_what_was_chosen_and_what_was_tested_is_said(tmp_path: Path) -> None:
    notes = ["the epoch was chosen by these images"]
    result = {"kept": 3.0, "notes": notes, "test": {"top1": 0.25, "top5": 0.5, "standard_error": 0.03}}
    run = made_run(tmp_path / "run", record(3, "a"), result)
    write_page([run])
    page = page_of(run)
    at = page.words.index("Test top-1")
    assert page.words[at : at + 5] == ["Test top-1", "25.0", "%", "± 3.0", "on the split test, measured once"]
    assert notes[0] in page.words
    assert "Written are the weights of epoch 3." in page.words


def test_a_folder_without_a_run_is_refused(tmp_path: Path, refused: Any) -> None:
    assert f"{tmp_path}: wanted the folder of a run" in refused("report", str(tmp_path))
    run = made_run(tmp_path / "run")
    (run / "report.json").write_text("{")
    assert f"{run}: wanted the files of a run" in refused("report", str(run))
    (run / "report.json").write_text('{"confusion": [[9, 9, 1]]}')
    assert f"{run}: wanted the files of a run" in refused("report", str(run))


def test_a_page_wants_neither_torch_nor_images(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", record(3, "a"))
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'timm', 'torchvision', 'lightning_fabric']))\n"
        "from sparsemae.cli import main; main(sys.argv[1:])"
    )
    subprocess.run([sys.executable, "-c", code, "report", str(run)], check=True, cwd=tmp_path)
    assert (run / "report.html").is_file()
    shutil.rmtree(run)
