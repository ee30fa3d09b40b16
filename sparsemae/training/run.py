"""The start of a run: its devices, and the folder that it alone writes into."""

import atexit
import gc
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
import yaml
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy

from sparsemae.data.images import DefaultRules
from sparsemae.data.record import differences as record_differences
from sparsemae.files import retried, write_atomic
from sparsemae.limits import marked, with_values
from sparsemae.models.weights import card_of, read_metadata
from sparsemae.options import TrainerConfig, TrainingConfig
from sparsemae.plain_yaml import read_yaml
from sparsemae.renamed import OPTIONS, renamed
from sparsemae.training import checkpoint, lock, logs, mirrors
from sparsemae.training.config import differences, flatten_config
from sparsemae.training.device import PRECISIONS, check_precision, resolved_compile, resolved_precision, set_switches
from sparsemae.training.group import Group

C = TypeVar("C", bound=TrainingConfig)
PIXELS_OF_BEFORE = DefaultRules(exif=False, background=None, bits=None)


@dataclass
class Run:
    """The devices, and the folder that holds what comes out."""

    fabric: Fabric
    group: Group
    log: logs.RunLog
    folder: Path
    trainer: TrainerConfig
    """As configured, device_batch, precision and compile resolved."""
    seed: int
    config: dict[str, Any]
    changed: list[str]
    """How the configuration differs from that of the run in the folder."""

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints lie."""
        return self.folder / "checkpoints"

    @contextmanager
    def open(self) -> Iterator[None]:
        """Within: the folder is locked, and its first files are written. Enter it once all else is known to fit.

        Raises ValueError, on all processes, if the folder holds a run of another configuration or somebody's files,
        or another run is writing into it.
        """
        problem: str | None = None
        with ExitStack() as held:
            if self.fabric.is_global_zero:
                try:
                    self._check_folder()
                    self.folder.mkdir(parents=True, exist_ok=True)
                    self.log.lost = held.enter_context(lock.run_lock(self.folder, self.log.info))
                    held.push(self.log.close)
                    if not (self.folder / "environment.json").is_file():  # it tells a run's folder from somebody's
                        self.write_environment()
                    self.checkpoints.mkdir(exist_ok=True)
                    checkpoint.remove_leftovers(self.checkpoints)
                    write_atomic(self.folder / "config.yaml", yaml.safe_dump(self.config, sort_keys=False))
                except (ValueError, OSError) as error:
                    problem = str(error)
            if (problem := self.fabric.broadcast(problem)) is not None:
                raise ValueError(problem)
            try:
                yield
            finally:
                self.log.lost = str  # the lock, by which that is told, is released

    def write_environment(self) -> None:
        """Where the steps that come are taken; a run that has ended keeps its own."""
        write_atomic(self.folder / "environment.json", json.dumps(logs.environment(), indent=1))

    def compare_images(self, now: dict[str, Any]) -> None:
        """Raises ValueError, on all processes, if the run in the folder was trained on other images; see `record`.

        Of a checkpoint of before the class names are compared. With trainer.resume=anyway the difference is said.
        """
        changes: list[str] = []
        refused = self.trainer.resume == "never" or (self.changed and self.trainer.resume != "anyway")  # by `open`
        kept = checkpoint.list_checkpoints(self.checkpoints) if self.fabric.is_global_zero and not refused else []
        for path in reversed(kept):
            with suppress(ValueError, OSError, LookupError, TypeError, AttributeError):  # damaged: `fit` will say so
                before = read_metadata(path / f"{checkpoint.TRAINING}.safetensors").get("images")
                if before is None:
                    names = card_of(read_metadata(path / f"{checkpoint.WEIGHTS}.safetensors"), path).class_names
                    self.log.info("the checkpoint does not say what it was trained on; from here on it will")
                    before = {**now, "class_names": list(names)} if names else now
                changes = record_differences(before, now)
                break
        if changes := self.fabric.broadcast(changes):
            said = f"{self.folder}: the images are not those of the run: {'; '.join(changes)}"
            if self.trainer.resume != "anyway":
                raise ValueError(f"{said}; choose another --out, or go on with --trainer.resume anyway")
            self.log.info(said)

    def _check_folder(self) -> None:
        folder = self.folder
        if checkpoint.list_checkpoints(self.checkpoints):
            if self.trainer.resume == "never":
                raise ValueError(f"{folder}: holds a run already; wanted a new folder with trainer.resume=never")
            if self.changed and self.trainer.resume != "anyway":
                more = f" and {len(self.changed) - 4} more" if len(self.changed) > 4 else ""
                raise ValueError(
                    f"{folder}: holds a run with another configuration ({', '.join(self.changed[:4])}{more}); "
                    "choose another --out, or go on with --trainer.resume anyway"
                )
        elif not (folder / "environment.json").is_file() and folder.exists() and any(folder.glob("[!.]*")):
            raise ValueError(f"--out: {folder}: wanted a new folder or that of a run, got one with other files")


def start(config: TrainingConfig, group: Group) -> Run:
    """Launch the devices, one for each process of the group. Nothing is written before `Run.open`.

    Raises ValueError on settings that cannot work.
    """
    trainer = config.trainer
    mirrors.require_packages(config.loggers)
    precision = resolved_precision(trainer)
    check_precision(trainer, precision)
    set_switches(replace(trainer, precision=precision))
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it announces the precision in every process
    try:
        fabric = Fabric(
            accelerator=trainer.accelerator, devices=trainer.devices, num_nodes=trainer.num_nodes,
            precision=PRECISIONS[precision], plugins=group.environment,
            strategy=DDPStrategy(gradient_as_bucket_view=True) if group.world > 1 else "auto",
        )  # fmt: skip
    except RuntimeError as error:
        raise ValueError(f"trainer.accelerator: {trainer.accelerator} cannot be had here: {error}") from error
    group.launch(fabric.device)
    fabric.launch()
    if group.world > 1:  # what is registered keeps the group for good, and with it the loop and its images
        atexit.register(_leave_process_group, group)
    folder = Path(config.out)
    log = logs.RunLog(folder, fabric.is_global_zero)
    before = _kept_config(folder, log.info)
    compiles = resolved_compile(trainer, fabric.device)
    trainer = replace(
        _with_device_batch(trainer, fabric.world_size, before, folder), precision=precision, compile=compiles
    )
    now = {**asdict(config), "trainer": asdict(trainer)}
    for name in ("precision", "compile"):
        if before and before["trainer"].get(name, "auto") == "auto":  # written before it was resolved
            before["trainer"][name] = now["trainer"][name]
    changed = differences(before, now, asdict(type(config)()), dict(marked(config, "may_change"))) if before else []
    return Run(fabric, group, log, folder, trainer, config.seed, now, changed)


def with_rules_of_before(config: C) -> C:
    """The options, to go on with a run in their folder that was begun under other rules.

    When there were none of pixels, or when a tenth of all images was held out, whatever their classes. What the data
    settled then (`from_data`) is taken from the run.
    """
    before, data, plain = _kept_config(Path(config.out), lambda text: None), config.data, type(config)().data
    if not before:
        return config
    rules = {name: before["data"][name] for name in ("background", "bits")}
    if (data.background, data.bits) == (plain.background, plain.bits) and list(rules.values()) == [None, None]:
        data = replace(data, **rules)
    if data.val_rule == plain.val_rule:
        data = replace(data, val_rule=before["data"]["val_rule"])
    # the processors are those of now, and the network is that of the weights to start from
    kept, mine = flatten_config(before), ("data.workers", *["model.name"] * (config.init not in (None, "auto")))
    settled = {name: kept[name] for name in config.from_data if name in kept and name not in mine}
    again = [name for name in config.from_data if name not in settled]
    return with_values(replace(config, data=data, from_data=again), settled)


def _leave_process_group(group: Group) -> None:
    """gloo's threads, left alive, can abort a process that ends (pytorch #190489); NCCL may wait for lost ones."""
    if dist.is_initialized():
        if dist.get_backend() == "nccl" and not group.succeeded:
            sys.stdout.flush()
            os._exit(2)
        dist.destroy_process_group()
        gc.collect()  # cycles with DDP's modules in them hold the group, and so its threads


def _kept_config(folder: Path, info: Callable[[str], None]) -> dict[str, Any]:
    """The configuration that the run in the folder used, device_batch resolved; empty if there is none to continue.

    The last checkpoint has it; config.yaml, where that is damaged or of an earlier version, has that of the last start.
    """
    kept, counters = checkpoint.list_checkpoints(folder / "checkpoints"), dict[str, Any]()
    if not kept:
        return {}
    with suppress(ValueError, FileNotFoundError):  # damaged: `fit` will say so
        counters = retried(read_metadata, kept[-1] / f"{checkpoint.TRAINING}.safetensors", info)
    counters = checkpoint.migrated(counters, kept[-1])
    try:
        before = renamed(counters.get("config") or read_yaml(folder / "config.yaml"), OPTIONS)
        before["data"] = asdict(PIXELS_OF_BEFORE) | {"val_rule": "permutation"} | before["data"]
        trainer = before["trainer"]
        if trainer["device_batch"] is None:  # written before it was resolved
            trainer["device_batch"] = trainer["global_batch"] // (trainer["devices"] * trainer["num_nodes"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{folder}/config.yaml: wanted the configuration of the run to continue: {error}") from error
    return before


def _with_device_batch(trainer: TrainerConfig, world: int, before: dict[str, Any], folder: Path) -> TrainerConfig:
    """The micro-batch is part of what is computed (mixup and drop path draw for each): a run keeps its own."""
    if trainer.device_batch is not None or trainer.global_batch % world:
        return trainer
    if not before:
        return replace(trainer, device_batch=trainer.global_batch // world)
    kept = before["trainer"]["device_batch"]
    if trainer.global_batch % (world * kept):
        raise ValueError(
            f"trainer.devices: {folder} was begun with {kept} images per device and forward, which {world} processes "
            f"cannot keep at a global batch of {trainer.global_batch}; take at most {trainer.global_batch // kept}, or "
            "give that up with --trainer.device_batch and --trainer.resume anyway"
        )
    return replace(trainer, device_batch=kept)
