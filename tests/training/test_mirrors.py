"""`--log`: what TensorBoard, CSV and Weights & Biases hold is what metrics.jsonl holds."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import metrics, tiny

from sparsemae.cli import main
from sparsemae.training import mirrors
from sparsemae.training.logs import RunLog

RECORDS: list[dict[str, Any]] = [
    {"step": 1, "epoch": 0.5, "loss": 1 / 3, "lr": 1e-7},
    {"step": 2, "epoch": 1.0, "loss": 1e-30, "lr": 2.5e-3, "bad_steps": 3},
    {"step": 2, "epoch": 1.0, "top1": 0.1 + 0.2},
    {"step": 3, "epoch": 1.5, "loss": 2.0, "lr": 0.0},
]


def by_tag(records: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of each figure, as floats of 32 bits."""
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for record in records:
        for name, value in record.items():
            if name != "step":
                found[name].append((record["step"], float(np.float32(value))))
    return found


def in_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = (folder / "tensorboard").iterdir()
    events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def in_csv(folder: Path) -> list[dict[str, Any]]:
    with (folder / "csv/metrics.csv").open(newline="") as stream:
        rows = [{name: float(text) for name, text in row.items() if text} for row in csv.DictReader(stream)]
    return [row | {"step": int(row["step"])} for row in rows]


def wandb_records(content: bytes) -> Iterator[bytes]:
    """Of a .wandb file: LevelDB's log format, after seven bytes of its own."""
    at, whole, block = 7, b"", 1 << 15
    while at + 7 <= len(content):
        if block - at % block < 7:  # too short for a header
            at += block - at % block
            continue
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        whole += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # all of a record, or its last part
            yield whole
            whole = b""


def write_all(folder: Path, names: list[str], records: list[dict[str, Any]]) -> None:
    log = RunLog(folder)
    log.mirror(names, {"seed": 0})
    for record in records:
        log.write("metrics.jsonl", record)
        log.write("topology.jsonl", record)
    log.close(None)


@pytest.mark.holds("own.6")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_files_hold_what_metrics_jsonl_holds_however_often_the_run_was_continued(tmp_path: Path) -> None:
    names = ["tensorboard", "csv"]
    write_all(tmp_path, names, RECORDS)
    assert in_tensorboard(tmp_path) == by_tag(RECORDS)
    assert in_csv(tmp_path) == RECORDS
    RunLog(tmp_path).truncate_after(1)  # as if it went on from a checkpoint of step 1
    again = [record | {"epoch": 7.0} for record in RECORDS[1:]]
    write_all(tmp_path, names, again)
    assert metrics(tmp_path) == RECORDS[:1] + again
    assert in_tensorboard(tmp_path) == by_tag(RECORDS[:1] + again)
    assert in_csv(tmp_path) == RECORDS[:1] + again


@pytest.mark.slow
@pytest.mark.holds("own.6")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_run_is_mirrored(tmp_path: Path) -> None:
    words = tiny("finetune", tmp_path / "run", "--log", "tensorboard,csv", "--trainer.save_every_steps", "2")
    main([*words, "--trainer.max_steps", "2"])
    main(words)
    written = metrics(tmp_path / "run")
    assert written[-1]["step"] == 6
    assert in_tensorboard(tmp_path / "run") == by_tag(written)
    assert in_csv(tmp_path / "run") == written


@pytest.mark.slow
@pytest.mark.holds("own.6")
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
@pytest.mark.filterwarnings("ignore")
def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb-home"))
    folder = tmp_path / "run"
    folder.mkdir()
    write_all(folder, ["wandb"], RECORDS)
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    assert (folder / "wandb-id.txt").read_text() in file.name
    from wandb.proto import wandb_internal_pb2 as proto

    rows = []
    for content in wandb_records(file.read_bytes()):
        record: Any = proto.Record()  # type: ignore[attr-defined]
        record.ParseFromString(content)
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.append({name: value for name, value in items.items() if name[0] != "_"} | {"step": items["_step"]})
    wanted: dict[int, dict[str, Any]] = defaultdict(dict)
    for record in RECORDS:
        wanted[record["step"]] |= record
    assert rows == list(wanted.values())


@pytest.mark.parametrize("words", ["tensorbord", "csv,comet", "tensorboard wandb"])
def test_another_name_is_refused_before_torch_is_loaded(words: str, refused: Callable[..., str]) -> None:
    assert "log: wanted some of tensorboard, csv, wandb, got " in refused("finetune", "--log", words)


def test_a_package_that_is_missing_is_named(
    tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirrors, "find_spec", lambda name: None)
    said = refused(*tiny("finetune", tmp_path / "run", "--log", "csv,wandb"))
    assert said.endswith("log: wanted the package wandb, which is not installed: pip install wandb")
    assert not (tmp_path / "run").exists()


def test_a_full_disk_ends_the_mirror_and_not_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path)
    log.mirror(["csv"], {})
    log.write("metrics.jsonl", RECORDS[0])
    (tmp_path / "csv/metrics.csv").unlink()
    (tmp_path / "csv").rmdir()
    for record in RECORDS[1:]:
        log.write("metrics.jsonl", record)
    assert metrics(tmp_path) == RECORDS
    assert capsys.readouterr().err.count("nothing more is written to CSVLogger") == 1
    assert math.isfinite(RECORDS[0]["loss"])
