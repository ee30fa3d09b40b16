"""Mutated packed files, images, tars and run folders: no crash, hang, traceback, process, or memory beyond bounds."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fuzz_files import IMAGE_BYTES, MAX_PIXELS, Images, Packed, RunFolders, Tars
from watched import watched

SHARE = float(os.environ.get("SPARSEMAE_TEST_FUZZ_SHARE", "0.01"))
"""Of the whole, which `make fuzz` takes."""
KINDS: dict[str, tuple[Any, int]] = {
    "packed files": (Packed, 20_000),
    "images": (Images, 5_000),
    "tars": (Tars, 2_000),
    "run folders": (RunFolders, 500),
}


@pytest.mark.slow
@pytest.mark.holds("held.3")
@pytest.mark.parametrize("name", KINDS)
def test_mutated_files_are_refused_in_one_line_or_read(tmp_path: Path, name: str, came_out: Any) -> None:
    kind, whole = KINDS[name]
    count = max(8, round(SHARE * whole))
    kind.make_originals(tmp_path / "originals")
    outcomes = list(watched(kind, tmp_path / "originals", tmp_path / "mutated", count))
    wrong = [outcome for outcome in outcomes if outcome.wrong]
    assert not wrong, "\n".join(map(str, wrong[:20]))
    assert len(outcomes) == count
    accepted = sum(not outcome.error for outcome in outcomes)
    assert 0 < accepted < count
    made = "; ".join(sorted({outcome.kind for outcome in outcomes}))
    bound = f"of {IMAGE_BYTES >> 20} MiB allowed at max_pixels={MAX_PIXELS:,}" if kind is Images else "at most"
    most, seconds = max(outcome.grown for outcome in outcomes), max(outcome.seconds for outcome in outcomes)
    said = (
        f"{count - accepted:,} refused in one line that names the file, {accepted:,} read; no process started; "
        f"{most / 2**20:.0f} MiB of memory {bound}, {seconds:.2f} s"
    )
    came_out(f"altered {name}", made, "-", said, times=count)
    assert len(Counter(outcome.way for outcome in outcomes)) >= min(count, 3)
