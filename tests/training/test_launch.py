"""The launchers that docs/scale-out.md names, with two processes on this machine: the same bits as accumulation."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny
from lightning_fabric.plugins.environments.lightning import find_free_network_port

from sparsemae.cli import main
from sparsemae.models.weights import read_weights


def words(out: Path, *options: str) -> list[str]:
    return tiny("pretrain", out, "--trainer.max_steps", "2", "--trainer.device_batch", "8", *options)


def commands(launcher: str, out: Path) -> list[tuple[list[str], dict[str, str]]]:
    """One command and its environment per machine (torchrun) or task (Slurm)."""
    port = str(find_free_network_port())
    if launcher == "torchrun, two nodes":
        job = ["-m", "sparsemae.cli", *words(out, "--trainer.devices", "1", "--trainer.num_nodes", "2")]
        start = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1",
                 "--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{port}"]  # fmt: skip
        return [([sys.executable, *start, *job], {}) for _ in range(2)]
    job = ["-m", "sparsemae.cli", *words(out, "--trainer.devices", "2")]
    return [
        (
            [sys.executable, *job],
            {
                "SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "pretrain", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2",
                "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0", "SLURM_NNODES": "1",
                "SLURM_NODELIST": "localhost", "MASTER_ADDR": "localhost", "MASTER_PORT": port,
            },
        )
        for rank in range(2)
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.holds("imagenet.3")
@pytest.mark.parametrize("launcher", [pytest.param("torchrun, two nodes", marks=pytest.mark.holds_only), "Slurm"])
def test_two_processes_of_a_launcher_equal_accumulation(tmp_path: Path, launcher: str) -> None:
    main(words(tmp_path / "accumulated"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    running = [
        subprocess.Popen(command, env=environment | own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command, own in commands(launcher, tmp_path / "processes")
    ]
    said = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    one, other = (read_weights(tmp_path / name)[0] for name in ("accumulated", "processes"))
    assert all(torch.equal(one[key], other[key]) for key in one)
