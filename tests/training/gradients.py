"""Run a job and save its gradients as they stand when the optimizer steps: OUT WORD... (under torchrun or alone)."""

import atexit
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sparsemae.cli import main


def no_gloo_threads() -> None:
    """At the very end: a thread of gloo that still holds a tensor would abort the process now and then."""
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").glob("*")]
    if any("gloo" in name for name in names):
        print(f"left alive: {names}", file=sys.stderr, flush=True)
        os._exit(1)


if __name__ == "__main__":
    atexit.register(no_gloo_threads)  # the first, so that it runs last

    def save(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if os.environ.get("RANK", "0") == "0":
            torch.save({str(i): p.grad.clone() for i, p in enumerate(parameters)}, sys.argv[1])

    register_optimizer_step_pre_hook(save)
    main(sys.argv[2:])
