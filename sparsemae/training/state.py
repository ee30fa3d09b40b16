"""All that a run must remember to go on as if nothing had happened. The rest follows from the seed and the step."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from sparsemae.card import ModelCard
from sparsemae.files import retried
from sparsemae.limits import flatten
from sparsemae.models.weights import load_weights, public_state
from sparsemae.sparsity import MaskSchedule, Topology, iter_sparse
from sparsemae.sparsity.pattern import check_finite
from sparsemae.training.checkpoint import (
    AVERAGE,
    TRAINING,
    VERSION,
    WEIGHTS,
    DamagedCheckpoint,
    Tensors,
    list_checkpoints,
    load_checkpoint,
    unflatten,
)
from sparsemae.training.config import flatten_config
from sparsemae.training.optim import FrozenVarianceAdamW, srste_pull


@dataclass
class BadSteps:
    """How many steps had a loss or gradient that is not finite; each is skipped, and listed with its images."""

    total: int = 0
    in_a_row: int = 0

    def count(self, bad: bool) -> None:
        """Take note of a step."""
        self.in_a_row = self.in_a_row + 1 if bad else 0
        self.total += bad


@dataclass
class TrainingState:
    """Weights, optimizer, average, masks and counters, to and from a checkpoint."""

    model: nn.Module
    optimizer: Any
    """Fabric's, or torch's own."""
    average: ModelEmaV3 | None
    """Moving average of the latent weights; its masks follow from them, fixed ones are shared."""
    masks: MaskSchedule
    topology: Topology | None
    bad: BadSteps = field(default_factory=BadSteps)
    done: int = 0
    """Optimizer steps taken, or skipped for their bad numbers."""
    logged_through: int = 0
    """How many of them are logged, evaluated and saved where due."""
    losses: list[float] = field(default_factory=list)
    """Of the steps since the last line of the log, over all processes."""
    best: dict[str, float] | None = None
    """Step and value of the best metric so far."""
    origin: dict[str, Any] = field(default_factory=dict)
    """What checkpoints say of where they are from: the run's whole ``config``, the ``packages`` it runs with, and the
    ``images`` that it is trained on."""

    def is_best(self, value: float, higher_is_better: bool) -> bool:
        """Note the metric of now if it is as good as any before: of equals the later has the lower learning rate."""
        sign = 1 if higher_is_better else -1
        if self.best is not None and sign * value < sign * self.best["value"]:
            return False
        self.best = {"step": self.done, "value": value}
        return True

    def moved(self) -> dict[str, Any]:
        """How the masks have moved, and ``pull`` by layer: by so much SR-STE's term shrinks a pruned weight."""
        assert self.topology is not None
        line: dict[str, Any] = asdict(self.topology.update())
        sparse = self.origin["config"]["sparse"]
        for name, pull in srste_pull(self.optimizer, self.model, sparse["strength"]).items():
            line["layers"][name]["pull"] = sparse["strength"] if sparse["term"] == "decoupled" else pull
        return line

    def identity(self) -> dict[str, Any]:
        """What all processes have alike: step, class names, settings, and of each weight the sum of its bits.

        Buffers are each process's own, and another machine may have the images elsewhere, and more processors.
        """
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}
        weights = {f"the checksum of {name}": weight.detach() for name, weight in self.model.named_parameters()}
        sums = [weight.view(bits[weight.element_size()]).sum(dtype=torch.int64) for weight in weights.values()]
        same = dict(zip(weights, torch.stack(sums).tolist(), strict=True))
        own = ("data.root", "data.workers")
        settings = {name: value for name, value in flatten_config(self.origin["config"]).items() if name not in own}
        names = hashlib.sha256(repr((self.origin["images"] or {}).get("class_names")).encode()).hexdigest()
        return {"the step": self.done, "the digest of the class names": names[:16], **settings, **same}

    def to_save(self, card: ModelCard) -> tuple[dict[str, Tensors], dict[str, dict[str, Any]]]:
        """Tensors (not copied) and metadata by file, as `save_checkpoint` takes them.

        Raises ValueError naming the layer if a sparse weight is not finite.
        """
        for name, layer in iter_sparse(self.model):
            check_finite(layer.weight, name)
        optimizer = {str(index): moments for index, moments in self.optimizer.state_dict()["state"].items()}
        training = {
            "optimizer": optimizer, "topology": self.topology.state_dict() if self.topology else {},
            **self.masks.state_dict(),
        }  # fmt: skip
        fixed = self.masks.fixed
        files = {WEIGHTS: public_state(self.model, fixed), TRAINING: flatten(training, "/")}
        card = replace(card, step=self.done, patterns=self.masks.patterns)
        metadata = {WEIGHTS: replace(card, ema_decay=None).to_dict(), TRAINING: self._counters()}
        if self.average is not None:
            files[AVERAGE], metadata[AVERAGE] = public_state(self.average.module, fixed), card.to_dict()
        return files, metadata

    def _counters(self) -> dict[str, Any]:
        return {
            "version": VERSION, "done": self.done, "logged_through": self.logged_through, "losses": list(self.losses),
            "best": self.best, "bad": asdict(self.bad), **self.origin,
        }  # fmt: skip

    def restore(self, path: Path) -> dict[str, Any]:
        """Become what a checkpoint holds; returns its counters.

        Raises ValueError as `load_checkpoint`, or if it is of another architecture or another kind of run.
        """
        files, counters = load_checkpoint(path)
        try:
            load_weights(self.model, files[WEIGHTS], self._moving(), strict=True, name=WEIGHTS)
            if self.average is not None and AVERAGE in files:
                load_weights(self.average.module, files[AVERAGE], self._moving(), strict=True, name=AVERAGE)
            elif self.average is not None:  # an average that begins here
                self.average.set(self.model)
            training = unflatten(files[TRAINING])
            moments = {int(index): state for index, state in training.get("optimizer", {}).items()}
            self._check_moments(moments)
            self._lay_out(moments)
            # groups are the configuration's; the checkpoint has none
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
            self.masks.load_state_dict(training)
            if self.topology is not None:
                self.topology.load_state_dict(training["topology"])
            self._set_counters(counters)
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
            raise ValueError(f"{path}: wanted a checkpoint of this run: {error}") from error
        return counters

    def restore_newest(self, folder: Path, info: Callable[[str], None]) -> tuple[dict[str, Any], list[Path]]:
        """Become what the last intact checkpoint of a run holds, if there are any; its counters, and the damaged ones.

        Raises ValueError, and leaves all files as they are, if none is intact or one cannot be read for another reason.
        """
        counters, damaged = dict[str, Any](), list[Path]()
        for path in reversed(list_checkpoints(folder)):
            try:
                counters = retried(self.restore, path, info)
                break
            except DamagedCheckpoint as error:
                damaged.append(path)
                info(str(error))
            except OSError as error:
                raise ValueError(f"{error}; nothing is lost, the same command goes on when it can be read") from error
        if damaged and not self.done:
            raise ValueError(f"{folder}: no intact checkpoint to continue from; choose another --out")
        return counters, damaged

    def _moving(self) -> list[str]:
        """Names of masks in a file of weights that are of moving layers: fixed ones, which `MaskSchedule` takes."""
        moving = (name.removeprefix("encoder.") for name, layer in iter_sparse(self.model) if not layer.frozen)
        return [f"{name}.weight_mask" for name in moving]

    def _check_moments(self, moments: Mapping[int, Mapping[str, Tensor]]) -> None:
        """torch would take anything, and fail, or make weights that are not finite, in the step."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for index, state in moments.items():
            second = "exp_avg_sq"
            if "variance" in state and isinstance(self.optimizer, FrozenVarianceAdamW):
                second = "variance"
            shapes = {"step": torch.Size(), "exp_avg": parameters[index].shape, second: parameters[index].shape}
            got = {name: value.shape for name, value in state.items() if value.dtype.is_floating_point}
            if index < 0 or got != shapes:
                raise ValueError(f"moments of parameter {index}: wanted numbers of {shapes}, got {got}")
            negative = state["step"] < 0 or (state[second] < 0).any()
            if negative or not all(value.isfinite().all() for value in state.values()):
                raise ValueError(f"moments of parameter {index}: wanted finite ones, no step and no square below 0")

    def _lay_out(self, moments: dict[int, dict[str, Tensor]]) -> None:
        """Give each moment its parameter's order in memory (channels last), which the fused AdamW takes for granted."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for index, state in moments.items():
            for name, value in state.items():
                if value.shape == parameters[index].shape:
                    state[name] = torch.empty_like(parameters[index], dtype=value.dtype, device="cpu").copy_(value)

    def _set_counters(self, counters: Mapping[str, Any]) -> None:
        self.bad = BadSteps(**{name: int(value) for name, value in counters["bad"].items()})
        self.done, self.logged_through = int(counters["done"]), int(counters["logged_through"])
        self.losses, best = [float(loss) for loss in counters["losses"]], counters["best"]
        self.best = None if best is None else {name: best[name] + 0 for name in ("step", "value")}
        if not 0 <= self.logged_through <= self.done:
            raise ValueError(f"counters: wanted 0 <= logged_through <= done, got {self.logged_through} and {self.done}")


def bad_record(losses: Tensor, indices: Tensor, filename: Callable[[int], str]) -> list[dict[str, Any]]:
    """The micro-batches of a bad step whose own loss is not finite, or else all of them, and their images.

    Args:
        losses: ``[W, K]``, of each process and micro-batch.
        indices: ``[W, K, B]``, the images.
        filename: an image's name.
    """
    finite = losses.isfinite()
    suspects = finite if finite.all() else ~finite
    return [
        {
            "number": number * len(losses) + rank,
            "loss": str(float(losses[rank, number])),
            "images": {index: filename(index) for index in indices[rank, number].tolist()},
        }
        for rank, number in suspects.nonzero().tolist()
    ]
