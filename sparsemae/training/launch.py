"""How many processes train, which of them this one is, and who starts them: a launcher, or the first process itself.

Fabric would start them too, but kills the first one when another ends with an error, in the middle of its saving.
"""

import os
import subprocess
import sys
from dataclasses import dataclass

from lightning_fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from sparsemae.options import TrainerConfig

LAUNCHERS: dict[str, type[ClusterEnvironment]] = {
    "torchrun": TorchElasticEnvironment, "srun": SLURMEnvironment, "jsrun": LSFEnvironment, "mpirun": MPIEnvironment,
}  # fmt: skip
PER_MACHINE = {"torchrun": "LOCAL_WORLD_SIZE", "srun": "SLURM_NTASKS_PER_NODE"}
PARENT = "SPARSEMAE_PARENT"
"""Environment variable of the processes that another process of ours has started: the number of that one."""


class _Started(LightningEnvironment):
    """Of processes that Fabric need not start."""

    @property
    def creates_processes_externally(self) -> bool:
        return True


@dataclass(frozen=True)
class Place:
    """Which of the processes this one is, and where they meet."""

    rank: int
    world: int
    environment: ClusterEnvironment
    """Tells Fabric the same."""
    address: str
    """Of the machine of process 0."""
    port: int
    """There; 0: any."""
    to_start: tuple[int, ...] = ()
    """Numbers on this machine of the processes that this one starts."""

    def start_others(self, port: int) -> list[subprocess.Popen[bytes]]:
        """Start the rest of this machine's processes, each with the command line of this one; ``port``: to meet at."""
        spec = sys.modules["__main__"].__spec__
        command = [sys.executable, *(["-m", spec.name] if spec else [os.path.abspath(sys.argv[0])]), *sys.argv[1:]]
        node = str(self.environment.node_rank())
        meeting = {"MASTER_ADDR": self.address, "MASTER_PORT": str(port), "NODE_RANK": node, PARENT: str(os.getpid())}
        return [
            subprocess.Popen(command, env={**os.environ, **meeting, "LOCAL_RANK": str(number)})
            for number in self.to_start
        ]


def find_place(trainer: TrainerConfig) -> Place:
    """This process's place. Raises ValueError if a launcher started other processes than the options say."""
    devices, nodes = trainer.devices, trainer.num_nodes
    for launcher, kind in LAUNCHERS.items():
        if kind.detect():
            try:
                environment = kind()
            except RuntimeError as error:
                raise ValueError(f"{launcher}: {error}") from error
            return _of_launcher(launcher, environment, devices, nodes)
    environment, own = _Started(), "LOCAL_RANK" not in os.environ
    if nodes > 1 and "MASTER_ADDR" not in os.environ:
        raise ValueError(
            f"trainer.num_nodes: {nodes} machines: wanted a launcher on each (torchrun, srun), or MASTER_ADDR, "
            "MASTER_PORT and NODE_RANK in the environment; see docs/scale-out.md"
        )
    rank = environment.node_rank() * devices + environment.local_rank()
    said = [int(os.environ.get(name, ours)) for name, ours in (("RANK", rank), ("WORLD_SIZE", devices * nodes))]
    if said != [rank, devices * nodes]:
        raise ValueError(
            f"trainer.devices: the environment has RANK {said[0]} of WORLD_SIZE {said[1]}: wanted as many as "
            f"--trainer.devices {devices} times --trainer.num_nodes {nodes}, by NODE_RANK and LOCAL_RANK"
        )
    port = 0 if rank == 0 and "MASTER_PORT" not in os.environ else environment.main_port
    to_start = tuple(range(1, devices)) if own else ()
    return Place(rank, devices * nodes, environment, environment.main_address, port, to_start)


def _of_launcher(launcher: str, environment: ClusterEnvironment, devices: int, nodes: int) -> Place:
    world, wanted = environment.world_size(), devices * nodes
    local = int(os.environ.get(PER_MACHINE.get(launcher, ""), world // nodes if world % nodes == 0 else world))
    if world != wanted or local != devices:
        raise ValueError(
            f"trainer.devices: {launcher} started {world} processes, {local} on a machine: wanted --trainer.devices "
            f"{local} --trainer.num_nodes {world // local}, got {devices} and {nodes}"
        )
    address, port = ("", 0) if world == 1 else (environment.main_address, environment.main_port)
    return Place(environment.global_rank(), world, environment, address, port)
