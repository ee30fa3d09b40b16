"""Foreign torch files (.pth, .pt, .bin), looked through before torch unpickles them.

``weights_only=True`` runs no code, but it believes what it reads: an array of any size can be asked for in a few bytes,
a zip may unfold, and no checksum is looked at. So a file is taken only if its pickles name nothing but what a state
dict is made of, are small beside the data, and its zip is stored plainly and intact; and torch maps it, so that no
storage can reach beyond it. What is looked through and mapped is a copy of our own, where there can be one: the file
itself, cut off meanwhile, would kill the process that maps it. Files from before torch 1.6 are no zips; torch compares
their storages with the data.

Checkpoints of MAE, DeiT and their kin also hold the arguments of their run and numbers of numpy. Their types are known
to be inert, and even so none is made: a stand-in takes what the pickle says of them, and drops it.
"""

import os
import pickletools
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.serialization import safe_globals

from sparsemae.models.names import prefixes

INERT = (
    "argparse.Namespace", "types.SimpleNamespace", "numpy.dtype", "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"pathlib.{pure}{name}Path" for pure in ("", "Pure") for name in ("", "Posix", "Windows")),
)  # fmt: skip
"""What a checkpoint may hold beside tensors; it is dropped."""
PLAIN = re.compile(
    r"collections (OrderedDict|Counter|defaultdict)|(__builtin__|builtins) (set|dict|int|complex)|_codecs encode"
    r"|torch\.nn\.parameter Parameter|torch(\.storage)? \w+Storage|torch\._utils _rebuild_(tensor(_v2)?|parameter)"
    r"|torch\._tensor _rebuild_from_type_v2|torch Tensor"
    r"|torch (Size|device|b?float\d+\w*|u?int\d+|bool|complex\d+)"
)
"""What a pickle may name; weights_only refuses some of it in turn."""
ZIP = b"PK\x03\x04"  # what torch goes by
PICKLE = b"\x80"  # protocol 2 or later, as torch has always written
LEGACY_PICKLES = 5  # magic number, protocol, system, content, storage keys


def load_torch_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict, which may lie under ``model`` or ``state_dict``. Never runs pickled code.

    Networks that lie under other keys (``model_ema``, ``teacher``) have that key before their names.

    Raises ValueError, naming the file, if it is of another kind, is damaged, needs more than tensors to load, or holds
    none.
    """
    with path.open("rb") as file:
        if not file.read(len(ZIP)).startswith((ZIP, PICKLE)):
            raise ValueError(f"{path}: wanted a model, as a safetensors or a torch file, got a file of another kind")
    with _copied(path) as copy:
        content = _loaded(copy, f"{path}: wanted a torch file of tensors only, got one that")
        size = copy.stat().st_size
    tensors = _tensors(content)
    if not tensors or not all(isinstance(key, str) for key in tensors):
        raise ValueError(f"{path}: wanted a state dict, got no tensors")
    if strange := [key for key, value in tensors.items() if value.layout != torch.strided or value.is_meta]:
        raise ValueError(f"{path}: wanted plain tensors, got {strange[0]} without values of its own")
    held = sum(value.nbytes for value in tensors.values())
    if held > 2 * size:  # views that repeat themselves; tied weights are named twice
        raise ValueError(f"{path}: wanted tensors that lie in the file, got {held:,} bytes from a file of {size:,}")
    return tensors


@contextmanager
def _copied(path: Path) -> Iterator[Path]:
    """A copy in memory, where the system has files there."""
    if not hasattr(os, "memfd_create"):
        yield path
        return
    with path.open("rb") as file, os.fdopen(os.memfd_create(path.name), "wb") as copy:
        shutil.copyfileobj(file, copy, 1 << 20)
        copy.flush()
        yield Path(f"/proc/self/fd/{copy.fileno()}")


def _loaded(path: Path, wanted: str) -> Any:
    """What a file holds. Raises ValueError, beginning with ``wanted``, if it cannot be loaded as tensors alone."""
    try:
        names, zipped = _names(path)
    except Exception as error:  # zip, pickle and end-of-file errors alike
        raise ValueError(f"{wanted} cannot be read: {_line(error)}") from error
    if code := sorted(name for name in names if not PLAIN.fullmatch(name) and name.replace(" ", ".") not in INERT):
        raise ValueError(f"{wanted} needs {code[0].replace(' ', '.')} to load (convert it to safetensors)")
    try:
        with safe_globals([(_Dropped, name) for name in INERT]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:
        raise ValueError(f"{wanted} cannot be read: {_line(error)}") from error


class _Dropped:
    """Takes whatever a pickle makes of a type in `INERT`, and keeps nothing."""

    def __new__(cls, *arguments: object) -> "_Dropped":
        return object.__new__(cls)

    def __init__(self, *arguments: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


def _tensors(content: object) -> dict[str, Tensor]:
    """By name; of a dict of dicts that under ``model`` or ``state_dict``, and those with a ViT."""
    if not isinstance(content, dict):
        return {}
    main = next((key for key in ("model", "state_dict") if isinstance(content.get(key), dict)), None)
    others = {f"{key}.": value for key, value in content.items() if key != main and isinstance(value, dict)}
    networks = {
        key: value for key, value in others.items() if prefixes(name for name in value if isinstance(name, str))
    }
    tensors = {}
    for prefix, state in {"": content if main is None else content[main], **networks}.items():
        for key, value in state.items():
            if type(value) in (Tensor, torch.nn.Parameter):
                tensors[f"{prefix}{key}" if prefix else key] = value.detach()
    return tensors


def _names(path: Path) -> tuple[set[str], bool]:
    """All that the pickles name, as ``module name``, and whether the file is a zip."""
    size = path.stat().st_size
    most = 2**16 + size // 64  # a byte of pickle may make a hundred of Python
    with path.open("rb") as stream:
        if stream.read(len(ZIP)) != ZIP:
            stream.seek(0)
            return set().union(*(_globals(stream, most) for _ in range(LEGACY_PICKLES))), False
        with zipfile.ZipFile(stream) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ValueError("its zip is compressed")
            if sum(entry.file_size for entry in entries) > size:
                raise ValueError("its zip says to hold more than itself")
            if corrupt := archive.testzip():
                raise ValueError(f"{corrupt} differs from its checksum")
            names = set()
            for entry in entries:
                if entry.filename.lower().endswith(".pkl"):
                    with archive.open(entry) as content:
                        names |= _globals(content, most)
            return names, True


def _globals(stream: IO[bytes], most: int) -> set[str]:
    """What one pickle names; leaves the stream at its end."""
    names, begin = set(), stream.tell()
    for operation, argument, position in pickletools.genops(stream):
        if operation.name in ("GLOBAL", "INST"):
            names.add(str(argument))
        elif operation.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
            raise ValueError(f"its pickle has the operation {operation.name}")
        if position is not None and position - begin > most:
            raise ValueError("its pickle is too large beside its data")
    return names


def _line(error: Exception) -> str:
    """The first sentence of what torch has to say, or the kind of error."""
    return str(error).strip().split("\n")[0].split(". ")[0][:200] or type(error).__name__
