"""What a server does to a packed model, for a while: serving.py FOLDER SECONDS. Prints samples and counts as JSON.

FOLDER has the packed files `bf16` and `int8`. Three threads call one model; meanwhile the main thread loads the other
one and drops it, forks children that answer, and passes what must be refused: wrong arrays, and packed files with bytes
changed. A sample is taken when that model is dropped: seconds, resident bytes, descriptors, threads.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np

from sparsemae.runtime import load

CALLERS = 3


def resources(pid: int | str = "self") -> tuple[int, int, int]:
    """Resident bytes, open descriptors and threads of a process."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in status)
    resident = 1024 * int(fields["VmRSS"].split()[0])
    return resident, len(os.listdir(f"/proc/{pid}/fd")), int(fields["Threads"])


def serve(folder: Path, seconds: float) -> dict[str, object]:
    """Samples, and how often each thing was done; asserts that each answer is the first one."""
    rng = np.random.default_rng(0)
    model = load(folder / "bf16", threads=2)
    shape = (3, model.vit.image_height, model.vit.image_width)
    images = rng.standard_normal((3, *shape), np.float32)
    wanted, other = model(images), load(folder / "int8", threads=2, quantize=True)(images)
    good = (folder / "int8").read_bytes()
    bad: list[np.ndarray] = [images[0], images.astype(np.float64), images[:, :, 1:], np.zeros((0, 3, 1, 1), np.float32)]
    counts = dict.fromkeys(("calls", "loads", "forks", "refusals"), 0)
    errors: list[BaseException] = []
    end = time.monotonic() + seconds

    def call(seed: int) -> None:
        own = np.random.default_rng(seed)
        try:
            while time.monotonic() < end:
                batch = int(own.integers(1, 4))
                assert (model(images[:batch]) == wanted[:batch]).all()
                counts["calls"] += 1
        except BaseException as error:
            errors.append(error)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(CALLERS)]
    for caller in callers:
        caller.start()
    samples = []
    while time.monotonic() < end and not errors:
        packed = load(folder / "int8", threads=2, quantize=bool(counts["loads"] % 2 == 0))
        if counts["loads"] % 2 == 0:
            assert (packed(images) == other).all()
        counts["loads"] += 1
        if counts["loads"] % 8 == 0:
            child = os.fork()
            if child == 0:
                os._exit(0 if (model(images) == wanted).all() else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            counts["forks"] += 1
        changed = bytearray(good)
        for at in rng.integers(0, len(good), 3):
            changed[at] ^= int(rng.integers(1, 256))
        (folder / "changed").write_bytes(changed)
        try:
            load(folder / "changed", threads=1)  # some changes are only other weights
        except ValueError:
            counts["refusals"] += 1
        try:
            packed(bad[counts["loads"] % len(bad)])
        except ValueError:
            counts["refusals"] += 1
        del packed
        samples.append((time.monotonic() - end + seconds, *resources()))
    for caller in callers:
        caller.join()
    if errors:
        raise errors[0]
    return {"samples": samples, "counts": counts}


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # a fork beside threads is what is tried
    print(json.dumps(serve(Path(sys.argv[1]), float(sys.argv[2]))))
