"""The benchmark runs with what is installed, says what is missing, and writes what it measured."""

import json
from pathlib import Path

import pytest
import reference

from sparsemae.benchmark import BenchmarkConfig, Measurement, benchmark, table
from sparsemae.packing.format import write

SHAPE = {"patch_size": 16, "image_height": 224, "image_width": 224, "depth": 1}


def test_packed_file_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "small.safetensors", reference.random_model(reference.vit_shape(**SHAPE)))
    config = BenchmarkConfig(
        files=[str(tmp_path / "small.safetensors"), str(tmp_path / "absent.safetensors")], engines=[], batches=[1, 3],
        threads=1, runs=2, json=str(tmp_path / "out.json"),
    )  # fmt: skip
    measured, absent = benchmark(config)
    assert set(measured.milliseconds) == {1, 3}
    assert min(measured.milliseconds.values()) > 0
    assert measured.resident_mb < 120
    assert 0 < measured.cold_start_seconds < 30
    assert "No such file" in absent.error
    assert json.loads((tmp_path / "out.json").read_text())["results"][0]["model"] == "small"
    assert "small" in capsys.readouterr().out


def test_table_names_what_is_missing() -> None:
    rows = [
        Measurement("packed", "T", {1: 5.0}, 0.3, 80.0),
        Measurement("openvino bf16", "B", error="No module named 'openvino'"),
    ]
    lines = table(rows, [1]).splitlines()
    assert "5.00" in lines[1]
    assert "200.0" in lines[1]
    assert lines[2].endswith("-- No module named 'openvino'")
