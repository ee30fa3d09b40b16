"""Run a job and save its gradients as they stand when the optimizer steps: OUT WORD... (under torchrun or alone)."""

import os
import sys
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sparsemae.cli import main

if __name__ == "__main__":

    def save(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if os.environ.get("RANK", "0") == "0":
            torch.save({str(i): p.grad.clone() for i, p in enumerate(parameters)}, sys.argv[1])

    register_optimizer_step_pre_hook(save)
    main(sys.argv[2:])
