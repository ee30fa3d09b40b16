"""Mutated checkpoint files: no crash, no hang, no code run, little memory, and each refusal names the file."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fuzz_checkpoints import Checkpoints, make_originals
from watched import SMALLEST, watched

FILES = int(os.environ.get("SPARSEMAE_TEST_FUZZ", "250"))
"""`make fuzz` takes more."""


@pytest.mark.slow
@pytest.mark.holds("survive.3")
def test_mutated_checkpoints_are_refused_or_what_they_say(tmp_path: Path, came_out: Any) -> None:
    make_originals(tmp_path)
    outcomes = list(watched(Checkpoints, tmp_path, tmp_path / "mutated", FILES))
    wrong = [outcome for outcome in outcomes if outcome.wrong]
    assert not wrong, "\n".join(map(str, wrong[:20]))
    assert len(outcomes) == FILES
    kinds = Counter((outcome.way, outcome.kind) for outcome in outcomes)
    accepted = Counter((outcome.way, outcome.kind) for outcome in outcomes if not outcome.error)
    assert not any("code" in kind for kind in accepted)
    assert len(kinds) > 20
    large = [outcome.grown / outcome.size for outcome in outcomes if outcome.size >= SMALLEST]
    code = sum(count for (_, kind), count in kinds.items() if kind == "code")
    made = (
        "bytes flipped, cut out, doubled, cut off; headers, cards and values edited; checksums made to fit; "
        f"zips torn, packed and rewritten; {code:,} pickles that run code or take memory"
    )
    refused, most = FILES - accepted.total(), max(outcome.seconds for outcome in outcomes)
    said = (
        f"{refused:,} refused with a ValueError that names the file, {accepted.total():,} accepted, being what they "
        f"say; no code run; at most {max(large):.2f} times the file in memory and {most:.2f} s"
    )
    came_out("altered checkpoint files", made, "-", said, times=FILES)
