"""Mutated checkpoints, and weights to start from, of both formats of torch and of our own."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mutations
import numpy as np
import torch
from mutations import edit, scramble, tensors_of
from watched import SMALLEST, Outcome, attempt

from sparsemae.card import InputSpec, ModelCard
from sparsemae.data.draws import INIT
from sparsemae.data.sampling import seed_all
from sparsemae.models.start import start_from
from sparsemae.models.weights import read_weights, save_model
from sparsemae.options.data import ImageDataConfig
from sparsemae.options.model import SparseConfig
from sparsemae.options.training import OptimConfig
from sparsemae.sparsity import MaskSchedule, Topology, iter_sparse
from sparsemae.tasks.classification import Classification
from sparsemae.tasks.loading import load_model
from sparsemae.tasks.sparse import make_sparse
from sparsemae.training.checkpoint import checkpoint_path, load_checkpoint, save_checkpoint
from sparsemae.training.optim import make_optimizer
from sparsemae.training.state import TrainingState

SIDE = 32
CARD = ModelCard(
    "classify", "vit_base_patch16_224", {"patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3},
    InputSpec.of(ImageDataConfig(img_size=SIDE)), tuple(f"class {i}" for i in range(10)),
)  # fmt: skip


def plain_model(seed: int) -> Any:
    seed_all(seed, INIT)
    return Classification.build(CARD)


def sparse_model(seed: int) -> Any:
    model = plain_model(seed)
    make_sparse(model, SparseConfig())
    return model


def state_of(model: Any) -> TrainingState:
    optimizer = make_optimizer(model, OptimConfig())
    return TrainingState(model, optimizer, None, MaskSchedule(model), Topology(model))


def step(state: TrainingState) -> None:
    """An optimizer step with gradients of 1."""
    for parameter in state.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()


def make_originals(folder: Path) -> None:
    """A checkpoint, a weights file, and torch files of both formats, of some megabytes."""
    model = sparse_model(seed=0)
    card = replace(CARD, patterns={name: str(layer.pattern) for name, layer in iter_sparse(model)})
    state = state_of(model)
    step(state)
    state.done = state.logged_through = 12
    state.losses, state.best = [0.5, 0.25], {"step": 6, "value": 0.5}
    save_checkpoint(checkpoint_path(folder, 12), *state.to_save(card))
    save_model(folder / "model.safetensors", model, card)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    torch.save({"model": weights, "epoch": 3}, folder / "zip.pth")
    torch.save({"model": weights, "epoch": 3}, folder / "legacy.pth", _use_new_zipfile_serialization=False)


class Trap:
    """Pickles to a call that leaves a trace."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


class Checkpoints:
    """Mutates the originals, and loads what comes out."""

    def __init__(self, originals: Path, folder: Path, seed: int) -> None:
        self._originals, self._folder, self._seed = originals, folder, seed
        self.trace = folder / "executed"
        self._state = state_of(sparse_model(seed=1))
        self._plain = plain_model(seed=1)
        self._images = torch.zeros(1, 3, SIDE, SIDE)
        self.ways: dict[str, tuple[Callable[[Any, Path], str], Callable[[Path], Any]]] = {
            "checkpoint": (self._damaged_checkpoint, self._restore),
            "checkpoint, sealed again": (self._forged_checkpoint, self._restore),
            "--init, safetensors": (self._safetensors, self._start),
            "--init, torch": (self._torch, self._start),
            "model": (self._safetensors, self._model),
        }

    def warm_up(self) -> None:
        for way, (_, load) in self.ways.items():
            name = {"checkpoint": "step-00000012", "--init": "zip.pth"}.get(way.split(",")[0], "model.safetensors")
            load(self._originals / name)

    def try_one(self, number: int) -> Outcome:
        """Make the file of a number, load it, and look at what came of it."""
        rng = np.random.default_rng([self._seed, number])
        way = list(self.ways)[number % len(self.ways)]
        make, load = self.ways[way]
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir()
        path = self._folder / {"checkpoint": "step-00000012"}.get(way.split(",")[0], "mutated")
        path = path if "checkpoint" in way else path.with_suffix(".pth" if "torch" in way else ".safetensors")
        outcome = Outcome(number, way, make(rng, path))
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        outcome.size = sum(file.stat().st_size for file in files)
        attempt(outcome, path, load, 4 * max(outcome.size, SMALLEST))
        if self.trace.exists():
            outcome.wrong += " was executed"
        if not outcome.error and not self._is_what_it_says(path):
            outcome.wrong += " was accepted, and is not what its checksum or its header says"
        return outcome

    # how files are loaded

    def _restore(self, path: Path) -> None:
        self._state.restore(path)
        step(self._state)
        self._state.to_save(CARD)

    def _start(self, path: Path) -> None:
        start_from(self._plain, str(path))
        with torch.no_grad():
            self._plain(self._images)

    def _model(self, path: Path) -> None:
        model, _ = load_model(path, "classify")
        with torch.no_grad():
            model(self._images)

    @staticmethod
    def _is_what_it_says(path: Path) -> bool:
        if path.suffix == ".pth":
            return not zipfile.is_zipfile(path) or zipfile.ZipFile(path).testzip() is None
        read = {path: read_weights(path)[0]} if path.is_file() else {}
        if path.is_dir():
            sums = json.loads((path / "sha256.json").read_text())
            if any(hashlib.sha256((path / name).read_bytes()).hexdigest() != said for name, said in sums.items()):
                return False
            read = {path / f"{name}.safetensors": tensors for name, tensors in load_checkpoint(path)[0].items()}
        return all(
            tensors_of(file.read_bytes())
            == {name: value.reshape(-1).view(torch.uint8).numpy().tobytes() for name, value in tensors.items()}
            for file, tensors in read.items()
        )

    # how files are made: each writes one, and says what it did

    def _damaged_checkpoint(self, rng: Any, path: Path) -> str:
        """One file of it changed, its checksums left."""
        shutil.copytree(self._originals / path.name, path)
        file = sorted(path.iterdir())[rng.integers(3)]
        if file.suffix == ".json" and rng.random() < 0.5:
            file.write_text(json.dumps(mutations.graft(rng, json.loads(file.read_text()))))
            return "json"
        return self._change(rng, file, file)

    def _forged_checkpoint(self, rng: Any, path: Path) -> str:
        """One file of it changed, and the checksums made to fit."""
        shutil.copytree(self._originals / path.name, path)
        file = path / ("model.safetensors" if rng.random() < 0.4 else "training.safetensors")
        kind = self._change(rng, file, file)
        sums = {each.name: hashlib.sha256(each.read_bytes()).hexdigest() for each in path.glob("*.safetensors")}
        (path / "sha256.json").write_text(json.dumps(sums))
        return kind

    def _safetensors(self, rng: Any, path: Path) -> str:
        return self._change(rng, self._originals / "model.safetensors", path)

    @staticmethod
    def _change(rng: Any, source: Path, target: Path) -> str:
        data = source.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        kind = ("bytes", "header bytes", "header", "card", "values")[rng.integers(5)]
        if source.suffix == ".json" or "bytes" in kind:
            kind, end = ("bytes", len(data)) if source.suffix == ".json" else (kind, end)
            target.write_bytes(scramble(rng, data, len(data) if kind == "bytes" else end))
        else:
            target.write_bytes(edit(rng, data, kind))
        return kind

    def _torch(self, rng: Any, path: Path) -> str:
        makers = (self._zip_bytes, self._legacy_bytes, self._zip_pickle, self._zip_entries, self._trap, self._saved)
        return makers[rng.integers(len(makers))](rng, path)

    def _zip_bytes(self, rng: Any, path: Path) -> str:
        data = (self._originals / "zip.pth").read_bytes()
        path.write_bytes(scramble(rng, data, len(data)))
        return "zip, bytes"

    def _legacy_bytes(self, rng: Any, path: Path) -> str:
        """Most of them in the pickles, which come first."""
        data = (self._originals / "legacy.pth").read_bytes()
        path.write_bytes(scramble(rng, data, 10_000 if rng.random() < 0.8 else len(data)))
        return "before zips, bytes"

    def _entries(self) -> dict[str, bytes]:
        with zipfile.ZipFile(self._originals / "zip.pth") as archive:
            return {name: archive.read(name) for name in archive.namelist()}

    def _zip_pickle(self, rng: Any, path: Path) -> str:
        """The pickle changed, the zip's checksums made to fit; or numbers in it made very large or small."""
        entries = self._entries()
        name = next(name for name in entries if name.endswith("data.pkl"))
        data = entries[name]
        if rng.random() < 0.5:
            for _ in range(int(rng.integers(1, 4))):
                data = scramble(rng, data, len(data))
        else:
            places = [i for i in range(len(data) - 5) if data[i : i + 1] in b"JKM"]
            at = places[rng.integers(len(places))]
            width = {b"J": 4, b"K": 1, b"M": 2}[data[at : at + 1]]
            number = int((-(2**31), -1, 0, 1, 2**20, 2**31 - 1)[rng.integers(6)])
            data = data[:at] + b"J" + struct.pack("<i", number) + data[at + 1 + width :]
        write_zip(path, entries | {name: data})
        return "zip, pickle"

    def _zip_entries(self, rng: Any, path: Path) -> str:
        """Entries cut off, left out, doubled, added, or packed, the checksums made to fit."""
        entries = self._entries()
        names = list(entries)
        name, kind = names[rng.integers(len(names))], rng.integers(5)
        if kind == 0:
            entries[name] = entries[name][: int(rng.integers(len(entries[name]) + 1))]
        elif kind == 1:
            for left in rng.choice(names, int(rng.integers(1, len(names))), replace=False):
                del entries[left]
        elif kind == 2:
            entries |= {name.replace("data/", "data/0", 1): b"\0" * 1000, f"{name.split('/')[0]}/constants.pkl": b"N."}
        elif kind == 3:
            entries[name] = b"\0" * int(rng.integers(1, 2**27))
        write_zip(path, entries, zipfile.ZIP_DEFLATED if kind >= 3 else zipfile.ZIP_STORED)
        return "zip, entries"

    def _trap(self, rng: Any, path: Path) -> str:
        """A pickle that executes code when it is loaded as pickles are, in each format."""
        command = f"touch {self.trace}"
        traps = (
            Trap(os.system, command), Trap(open, str(self.trace), "w"), Trap(exec, f"open({str(self.trace)!r}, 'w')"),
            Trap(eval, f"open({str(self.trace)!r}, 'w')"), Trap(shutil.copy, __file__, str(self.trace)),
            Trap(bytearray, 2**33), Trap(torch.FloatStorage, 2**33), Trap(torch.FloatTensor, 2**33),
        )  # fmt: skip
        content = {"model": {"head.weight": torch.ones(2)}, "extra": traps[rng.integers(len(traps))]}
        kind = int(rng.integers(6))
        if kind < 2:
            torch.save(content, path, _use_new_zipfile_serialization=bool(kind))
        elif kind < 5:
            path.write_bytes(pickle.dumps(content, protocol=(0, 2, 4)[kind - 2]))
        else:
            write_zip(path, {"archive/data.pkl": pickle.dumps(content, 2), "archive/version": b"3\n"})
        return "code"

    def _saved(self, rng: Any, path: Path) -> str:
        """Whole files of strange content: NaN, other types, other shapes, views without end, no tensors."""
        weights = dict(torch.load(self._originals / "zip.pth", weights_only=True)["model"])
        names = list(weights)
        name, kind = names[rng.integers(len(names))], rng.integers(8)
        value = weights[name]
        if kind == 0:
            value.view(-1)[int(rng.integers(value.numel()))] = (float("nan"), float("inf"))[rng.integers(2)]
        elif kind == 1:
            dtypes = torch.float64, torch.float16, torch.int64, torch.bool, torch.complex64, torch.uint8
            weights = {key: tensor.to(dtypes[rng.integers(6)]) for key, tensor in weights.items()}
        elif kind == 2:
            weights[name] = value.new_zeros(1).expand(int(rng.integers(1, 2**33)))
        elif kind == 3:
            weights["pos_embed"] = torch.zeros(*rng.integers(0, 6, int(rng.integers(0, 5))).tolist(), 96)
        elif kind == 4:
            weights[name] = value.to_sparse() if rng.random() < 0.5 else value.to("meta")
        elif kind == 5:
            weights = {f"vit.{key}": tensor for key, tensor in weights.items()}
            weights["vit.embeddings.patch_embeddings.projection.weight"] = value
            weights["vit.layers.0.attention.query.weight"] = value
        elif kind == 6:
            weights = dict(enumerate(weights.values()))
        else:
            weights[name] = [value, {"a": value}, "text", None][rng.integers(4)]
        content = (weights, {"state_dict": weights}, [weights], {"model": {"model": weights}})[rng.integers(4)]
        torch.save(content, path, _use_new_zipfile_serialization=bool(rng.random() < 0.7))
        return "content"


def write_zip(path: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression, compresslevel=1) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
