"""The kernel benchmark measures every table, and its table in a file keeps the rows of other processors."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference

from sparsemae.benchmark import kernels
from sparsemae.benchmark.command import benchmark
from sparsemae.options import BenchmarkConfig
from sparsemae.runtime import native

SMALL = reference.vit_shape(depth=1)


def test_every_table_is_measured() -> None:
    rows = kernels.measure(1, SMALL)
    assert list(dict.fromkeys(row.isa for row in rows)) == native.usable_isas()
    for row in rows:
        assert set(row.milliseconds) == {"norm", "qkv", "attention", "proj", "fc1", "fc2"}
        assert min(row.milliseconds.values()) > 0
        assert row.share > 0
        assert row.attention_share > 0
        assert row.instructions
        multiply_adds = SMALL.tokens * (4 * 64 * 64 + 2 * 64 * 128) * int(row.weights[0]) / 32
        linears = sum(row.milliseconds[name] for name in ("qkv", "proj", "fc1", "fc2"))
        assert row.gmacs == pytest.approx(multiply_adds / linears / 1e6)
    made_of = {(row.isa, row.weights): row.instructions for row in rows}
    for (isa, weights), instructions in made_of.items():  # both patterns, and int8 where it is multiplied otherwise
        assert (isa, weights.replace("2:32", "4:32")) in made_of
        assert weights.endswith("bf16") or made_of.get((isa, weights.replace("int8", "bf16"))) != instructions


@pytest.mark.holds_only
@pytest.mark.holds("fast.2")
@pytest.mark.skipif("avx512vnni" not in native.usable_isas(), reason="needs AVX-512 with VNNI, VBMI and BF16")
def test_gathers_come_near_their_instructions_peak(benchmark_line: Any) -> None:
    """One core, the linear layers of a block of SparseMAE-T, rounding included."""
    rows = {(row.isa, row.weights): row for row in kernels.measure(100)}
    for weights, bar in {"2:32 int8": 0.55, "2:32 bf16": 0.65}.items():
        row = rows["avx512vnni", weights]
        benchmark_line(f"{row.processor.split(':')[0]}, {weights}, {row.instructions}", row.share, bar, True)


def test_own_rows_are_replaced_and_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (row, *_) = kernels.measure(1, SMALL)
    other = replace(row, processor="GenuineIntel 6/143/8 (Sapphire Rapids): avx2 amx")
    file = tmp_path / "README.md"
    file.write_text("before\n<!-- table of make kernels -->\n<!-- end -->\nafter\n")
    kernels.refresh(file, [other])
    monkeypatch.setattr(kernels, "measure", lambda runs: [replace(row, gmacs=float(runs))])
    for runs in (111, 222):
        benchmark(BenchmarkConfig(section="kernels", runs=runs, readme=str(file)))
    text = file.read_text()
    assert text.startswith("before\n")
    assert text.endswith("<!-- end -->\nafter\n")
    assert text.count("GenuineIntel 6/143/8 (Sapphire Rapids): avx2 amx | ") == 1
    assert text.count(native.processor_name()) == 1
    assert " 222 " in text
    assert " 222 " in capsys.readouterr().out
    (tmp_path / "none.md").write_text("no table")
    with pytest.raises(ValueError, match=r"none\.md: wanted a table between"):
        kernels.refresh(tmp_path / "none.md", [row])


def test_processor_is_named_by_its_numbers() -> None:
    name, features = native.processor()
    assert name == "" or len(name.split()[1].split("/")) == 3
    assert ("avx2" in features) == ("avx2" in native.usable_isas())
    assert native.processor_name().endswith(" ".join(features) or "none by name")
