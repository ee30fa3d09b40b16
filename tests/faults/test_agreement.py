"""Processes that are not at the same step of the same run refuse to go on; and those that were started otherwise than
the options say never begin."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny
from harness import run
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from sparsemae.options import TrainerConfig
from sparsemae.sparsity import MaskSchedule
from sparsemae.training import launch, run as run_start, state
from sparsemae.training.checkpoint import list_checkpoints
from sparsemae.training.state import TrainingState

TWO = ["--trainer.device_batch", "8"]


def second() -> bool:
    """Whether this is the second process."""
    return os.environ["RANK"] == "1"


def miss_the_last_checkpoint() -> None:
    """The second process does: its file system is late."""
    listed = list_checkpoints
    if second():
        state.list_checkpoints = lambda folder: listed(folder)[:-1]


def lose_a_bit() -> None:
    """The second process does, in one weight, in step 3."""
    steps = []

    def flip(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        steps.append(1)
        if second() and len(steps) == 3:
            bits = optimizer.param_groups[0]["params"][0].data.view(torch.int32)
            bits.flatten()[0] ^= 1

    register_optimizer_step_post_hook(flip)


def multiply_otherwise() -> None:
    """The second process does, as on another kind of processor."""
    if second():
        run_start.resolved_precision = lambda trainer: "fp64"


def one_line_each(statuses: list[int | None], output: str) -> str:
    """What both processes say."""
    assert statuses == [2, 2], output
    assert "Traceback" not in output
    lines = [line for line in output.splitlines() if "error: " in line]
    assert len(lines) == 2, output
    assert lines[0] == lines[1]
    return lines[0]


@pytest.mark.holds_only
@pytest.mark.slow
@pytest.mark.holds("held.1")
def test_1_processes_that_resume_from_different_steps(tmp_path: Path, came_out: Any) -> None:
    words = tiny("pretrain", tmp_path / "run", *TWO, "--trainer.save_every_steps", "2")
    assert run([*words, "--trainer.max_steps", "4"], 2)[0] == [0, 0]
    kept = list_checkpoints(tmp_path / "run" / "checkpoints")
    line = one_line_each(*run(words, 2, miss_the_last_checkpoint))
    assert "wanted the same in all processes, got: the step is 4 in process 0, 2 in process 1; the checksum of " in line
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == kept
    assert run(words, 2)[0] == [0, 0]
    came_out("two processes at different steps", "the second one does not see the last checkpoint", "2 and 2", line)


@pytest.mark.slow
@pytest.mark.holds("held.1")
def test_1_processes_with_different_weights(tmp_path: Path, came_out: Any) -> None:
    words = tiny(
        "pretrain", tmp_path / "run", *TWO, "--trainer.save_every_steps", "2", "--trainer.log_every_steps", "4"
    )
    line = one_line_each(*run(words, 2, lose_a_bit))
    assert "wanted the same in all processes, got: " in line
    assert ": the checksum of " in line
    assert "the step" not in line
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000002"]
    came_out("two processes with different weights", "one bit flipped in step 3; logged every 4", "2 and 2", line)


@pytest.mark.slow
@pytest.mark.holds("held.1")
def test_1_processes_with_different_settings(tmp_path: Path, came_out: Any) -> None:
    line = one_line_each(*run(tiny("pretrain", tmp_path / "run", *TWO), 2, multiply_otherwise))
    assert "got: trainer.precision is fp32 in process 0, fp64 in process 1" in line
    assert not list_checkpoints(tmp_path / "run" / "checkpoints")
    came_out("two processes with different settings", "another precision resolved in the second one", "2 and 2", line)


def test_what_processes_agree_on() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2, dtype=torch.bfloat16))
    origin: dict[str, Any] = {"config": {"data": {"root": "/here", "workers": 1, "crop": (1, 2)}}, "images": None}
    state = TrainingState(model, None, None, MaskSchedule(model), None, origin=origin)
    before = state.identity()
    sums = {f"the checksum of {name}" for name, _ in model.named_parameters()}
    assert before.keys() == {"the step", "the digest of the class names", "data.crop", *sums}
    for name, parameter in model.named_parameters():
        bits = parameter.detach().view(torch.int32 if parameter.element_size() == 4 else torch.int16)
        assert before[f"the checksum of {name}"] == sum(bits.flatten().tolist())
    model[1].running_mean.add_(1)  # type: ignore[operator, union-attr]
    origin["config"]["data"] |= {"root": "/there", "workers": 2}
    assert state.identity() == before
    state.done, origin["images"] = 1, {"class_names": ["cat"]}
    differ = {name for name, value in state.identity().items() if value != before[name]}
    assert differ == {"the step", "the digest of the class names"}


TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "RANK": "1", "LOCAL_RANK": "1", "GROUP_RANK": "0", "MASTER_ADDR": "localhost",
            "MASTER_PORT": "1"}  # fmt: skip
SRUN = {"SLURM_JOB_NAME": "train", "SLURM_JOB_ID": "1", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0",
        "SLURM_NODELIST": "localhost"}  # fmt: skip
OTHERWISE = {
    "torchrun, no options": (TORCHRUN | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, [],
        "torchrun started 2 processes, 2 on a machine: wanted --trainer.devices 2 --trainer.num_nodes 1, got 1 and 1"),
    "torchrun, too many": (TORCHRUN | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, ["--trainer.devices", "4"],
        "torchrun started 2 processes, 2 on a machine: wanted --trainer.devices 2 --trainer.num_nodes 1, got 4 and 1"),
    "torchrun, as many, otherwise": (
        TORCHRUN | {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}, ["--trainer.devices", "2", "--trainer.num_nodes", "2"],
        "torchrun started 4 processes, 4 on a machine: wanted --trainer.devices 4 --trainer.num_nodes 1, got 2 and 2"),
    "srun, no options": (SRUN | {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1"}, [],
        "srun started 2 processes, 2 on a machine: wanted --trainer.devices 2 --trainer.num_nodes 1, got 1 and 1"),
    "srun, one task": (SRUN | {"SLURM_NTASKS": "1", "SLURM_NNODES": "1"}, ["--trainer.devices", "8"],
        "srun started 1 processes, 1 on a machine: wanted --trainer.devices 1 --trainer.num_nodes 1, got 8 and 1"),
    "srun, tasks but not per node": (SRUN | {"SLURM_NTASKS": "2"}, ["--trainer.devices", "2"],
        "srun: You set `--ntasks=2` in your SLURM bash script"),
    "by hand": ({"RANK": "1", "WORLD_SIZE": "2"}, [],
        "the environment has RANK 1 of WORLD_SIZE 2: wanted as many as --trainer.devices 1 times"),
    "two machines, no launcher": ({}, ["--trainer.num_nodes", "2"],
        "trainer.num_nodes: 2 machines: wanted a launcher on each (torchrun, srun), or MASTER_ADDR"),
}  # fmt: skip


@pytest.mark.holds("held.1")
@pytest.mark.parametrize("case", OTHERWISE)
def test_3_a_launcher_that_started_other_processes_than_the_options_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Any, came_out: Any, case: str
) -> None:
    environment, options, wanted = OTHERWISE[case]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    line = refused(*tiny("pretrain", tmp_path / "run", *options))
    assert wanted in line
    assert not (tmp_path / "run").exists()
    came_out(f"launcher against options: {case}", " ".join(options) or "no option", 2, line)


def test_the_places_of_a_launchers_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def place(environment: dict[str, str], devices: int, nodes: int) -> tuple[Any, ...]:
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            found = launch.find_place(TrainerConfig(devices=devices, num_nodes=nodes))
            return found.rank, found.world, found.address, found.port, found.to_start

    assert place(TORCHRUN | {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, 2, 2) == (1, 4, "localhost", 1, ())
    slurm = SRUN | {"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "2"} | {
        "MASTER_ADDR": "localhost", "MASTER_PORT": "7"
    }  # fmt: skip
    assert place(slurm, 2, 2) == (1, 4, "localhost", 7, ())
    assert place({}, 3, 1) == (0, 3, "127.0.0.1", 0, (1, 2))
    hand = {"MASTER_ADDR": "here", "MASTER_PORT": "5", "NODE_RANK": "1"}
    assert place(hand, 2, 2) == (2, 4, "here", 5, (1,))
    assert place(hand | {"LOCAL_RANK": "1"}, 2, 2) == (3, 4, "here", 5, ())
    assert place({}, 1, 1)[:2] == (0, 1)
