"""The native library by ctypes: include/sparsemae.h, and a few functions of native/c_api.cpp beside it.

A call costs a microsecond; Python's lock is free while the library computes. What it refuses is a ValueError.
"""

import ctypes
import re
import sys
import weakref
from ctypes import POINTER, c_char_p, c_double, c_float, c_int, c_size_t, c_uint, c_uint8, c_uint32, c_void_p
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

NAME = {"darwin": "libsparsemae.dylib", "win32": "libsparsemae.dll"}.get(sys.platform, "libsparsemae.so")
MOST_TIMINGS = 32


class _Description(ctypes.Structure):
    _fields_ = [
        ("channels", c_uint32), ("height", c_uint32), ("width", c_uint32), ("classes", c_uint32), ("outputs", c_uint32),
        ("threads", c_uint32), ("isa", c_char_p), ("class_names", c_void_p), ("config", c_char_p),
        ("rows", c_uint32), ("columns", c_uint32),
    ]  # fmt: skip


class _Timing(ctypes.Structure):
    _fields_ = [
        ("kernel", c_char_p), ("instructions", c_char_p), ("seconds", c_double), ("peak", c_double), ("zeros", c_int)
    ]  # fmt: skip


_FLOATS, _BYTES = POINTER(c_float), POINTER(c_uint8)
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "open_as": (c_void_p, [c_char_p, c_size_t, c_uint32, c_char_p, c_int]),
    "describe": (POINTER(_Description), [c_void_p]),
    "forward": (c_int, [c_void_p, _FLOATS, c_size_t, _FLOATS]),
    "segment": (c_int, [c_void_p, _BYTES, c_uint32, c_uint32, c_uint32, _BYTES]),
    "scores": (c_int, [c_void_p, _FLOATS, c_size_t, c_size_t, c_size_t, _FLOATS]),
    "features": (c_int, [c_void_p, _FLOATS, c_size_t, _FLOATS]),
    "features_shape": (None, [c_void_p, POINTER(c_uint32)]),
    "close": (None, [c_void_p]),
    "error": (c_char_p, []),
    "math": (c_char_p, [c_void_p]),
    "isas": (c_char_p, []),
    "processor": (c_char_p, []),
    "time_kernels": (c_int, [c_void_p, c_size_t, POINTER(_Timing), c_int]),
    "select_kept": (c_int, [c_void_p, c_size_t, c_size_t, c_size_t, c_size_t, c_void_p, c_void_p]),
    "kept_bf16": (c_int, [c_void_p, c_void_p, c_size_t, c_size_t, c_void_p]),
    "pull_pruned": (c_int, [c_void_p, c_void_p, c_void_p, c_size_t, c_float, c_size_t]),
    "decode_positions": (c_int, [c_char_p, c_size_t, c_size_t, c_uint, c_uint, _BYTES]),
}


def _opened() -> tuple[ctypes.CDLL, Path]:
    # an editable install has it in another folder than this file
    files = [folder / NAME for folder in (*map(Path, sys.modules[__package__].__path__), Path(__file__).parent)]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise ImportError(f"wanted the native library {files[-1]}, got none: pip install builds it")
    library = ctypes.CDLL(str(file))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, f"sparsemae_{name}", None)
        if function is None:
            raise ImportError(f"wanted {file} of this version, got another: pip install builds it")
        function.restype, function.argtypes = result, arguments
    return library, file


_LIBRARY, FILE = _opened()
"""And where it lies."""


def _refuse() -> NoReturn:
    said = _LIBRARY.sparsemae_error().decode(errors="replace")
    raise MemoryError(said) if said == "out of memory" else ValueError(said)


class Vit:
    """The forward of one packed file."""

    def __init__(self, content: bytes, threads: int, isa: str = "", quantize: bool | None = None) -> None:
        """Raises ValueError, without the file's name, if the content is no packed model or `isa` cannot be had."""
        if not 1 <= threads <= 1024:
            raise ValueError(f"threads must be in [1, 1024], got {threads}")
        rounded = -1 if quantize is None else bool(quantize)
        self._model = _LIBRARY.sparsemae_open_as(content, len(content), threads, isa.encode(), rounded)
        if not self._model:
            _refuse()
        self._close = weakref.finalize(self, _LIBRARY.sparsemae_close, self._model)
        self._of, tokens = _LIBRARY.sparsemae_describe(self._model).contents, (c_uint32 * 3)()
        _LIBRARY.sparsemae_features_shape(self._model, tokens)
        self._tokens: tuple[int, ...] = tuple(tokens[:2])
        self._all_tokens = bool(tokens[2])

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return str(self._of.isa.decode())

    @property
    def math(self) -> str:
        """What the sparse products are computed in."""
        return str(_LIBRARY.sparsemae_math(self._model).decode())

    @property
    def config(self) -> str:
        """The metadata's JSON."""
        return str(self._of.config.decode(errors="replace"))

    @property
    def threads(self) -> int:
        """How many compute."""
        return int(self._of.threads)

    def __call__(self, images: NDArray[np.float32], features: bool) -> NDArray[np.float32]:
        """Logits [B, C] of float32 images [B, C, H, W], of an encoder its pooled features; or all tokens [B, L, D]."""
        of = self._of
        if images.dtype != np.float32 or images.shape[1:] != (of.channels, of.height, of.width):
            raise ValueError(
                f"images must be float32 [B, {of.channels}, {of.height}, {of.width}], got {images.dtype} "
                f"{list(images.shape)}"
            )
        shape = self._tokens if features or self._all_tokens else (of.outputs,)
        images, out = np.ascontiguousarray(images), np.empty((len(images), *shape), np.float32)
        call = _LIBRARY.sparsemae_features if features else _LIBRARY.sparsemae_forward
        if call(self._model, images.ctypes.data_as(_FLOATS), len(images), out.ctypes.data_as(_FLOATS)):
            _refuse()
        return out

    def scores(self, images: NDArray[np.float32], patch: int) -> NDArray[np.float32]:
        """Of a segmenter, [B, rows, columns, classes] of float32 images [B, C, H, W] of whole patches."""
        of, (batch, channels, height, width) = self._of, images.shape
        if images.dtype != np.float32 or channels != of.channels or height % patch or width % patch or not images.size:
            raise ValueError(f"images must be float32 [B, {of.channels}, H, W] of whole patches, got {images.dtype} "
                             f"{list(images.shape)}")  # fmt: skip
        out = np.empty((batch, height // patch, width // patch, of.classes), np.float32)
        images, into = np.ascontiguousarray(images), out.ctypes.data_as(_FLOATS)
        if _LIBRARY.sparsemae_scores(self._model, images.ctypes.data_as(_FLOATS), batch, height, width, into):
            _refuse()
        return out

    def classes(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Of a segmenter, the class [H, W] of each pixel uint8 [H, W, 3], by windows as the file says."""
        height, width, channels = pixels.shape
        pixels, out = np.ascontiguousarray(pixels, np.uint8), np.empty((height, width), np.uint8)
        at, into = pixels.ctypes.data_as(_BYTES), out.ctypes.data_as(_BYTES)
        if _LIBRARY.sparsemae_segment(self._model, at, width, height, channels, into):
            _refuse()
        return out

    def time_kernels(self, rounds: int) -> "list[KernelTiming]":
        """Of the first block, on the calling thread: native/bench.h."""
        room = (_Timing * MOST_TIMINGS)()
        count = _LIBRARY.sparsemae_time_kernels(self._model, rounds, room, MOST_TIMINGS)
        if count < 0:
            _refuse()
        return [KernelTiming(one) for one in room[:count]]


class KernelTiming:
    """How fast one kernel is."""

    def __init__(self, timing: _Timing) -> None:
        self.kernel, self.instructions = timing.kernel.decode(), timing.instructions.decode()
        self.seconds, self.peak, self.zeros = timing.seconds, timing.peak, bool(timing.zeros)


def usable_isas() -> list[str]:
    """Instruction sets with kernels that this processor can run, the fastest first."""
    return str(_LIBRARY.sparsemae_isas().decode()).split()


def processor() -> tuple[str, list[str]]:
    """Vendor, family, model and stepping; and the instruction sets that kernels could use."""
    name, _, features = _LIBRARY.sparsemae_processor().decode().partition("\n")
    return name, features.split()


def processor_name() -> str:
    """Vendor, family/model/stepping, generation where it is known: instruction sets."""
    name, features = processor()
    generation = next((known for pattern, known in _GENERATIONS.items() if re.match(pattern, name)), "")
    return f"{name or 'unknown'}{f' ({generation})' if generation else ''}: {' '.join(features) or 'none by name'}"


_GENERATIONS = {
    "AuthenticAMD 23/": "Zen 2 or older",
    "AuthenticAMD 25/1[67]/": "Zen 4",
    "AuthenticAMD 25/9[67]/": "Zen 4",
    "AuthenticAMD 25/1[12][0-9]/": "Zen 4",
    "AuthenticAMD 25/16[0-9]/": "Zen 4c",
    "AuthenticAMD 25/": "Zen 3",
    "AuthenticAMD 26/": "Zen 5",
    "GenuineIntel 6/85/": "Skylake-X, Cascade or Cooper Lake",
    "GenuineIntel 6/10[68]/": "Ice Lake",
    "GenuineIntel 6/143/": "Sapphire Rapids",
    "GenuineIntel 6/15[14]/": "Alder Lake",
    "GenuineIntel 6/(183|186|191)/": "Raptor Lake",
    "GenuineIntel 6/207/": "Emerald Rapids",
    "GenuineIntel 6/17[34]/": "Granite Rapids",
}


def decode_positions(codes: NDArray[np.uint8], groups: int, n: int, k: int) -> bytes:
    """Which of each group's k are kept, n bytes a group. Raises ValueError if a code is out of range."""
    out, content = (c_uint8 * (groups * n))(), codes.tobytes()
    if _LIBRARY.sparsemae_decode_positions(content, len(content), groups, n, k, out):
        _refuse()
    return bytes(out)


def run(function: str, *arguments: Any) -> None:
    """Call one of native/masks.h, its arrays as addresses."""
    if getattr(_LIBRARY, f"sparsemae_{function}")(*arguments):
        _refuse()
