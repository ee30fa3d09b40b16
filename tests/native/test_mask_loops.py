"""The loops over the masks of each instruction set give the bits of the plain ones."""

import ctypes
import platform
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from torch import Tensor

FLAGS = {
    "plain": [],
    "avx2": ["-mavx2"],
    "avx512": ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"],
}
SHIM = """
#include "mask_loops.h"
#include <cstring>
namespace {
#include "mask_loops-inl.h"
}
extern "C" const sparsemae::MaskLoops* loops() { return &kMaskLoops; }
"""
PATTERNS = ((2, 32), (4, 32), (8, 32), (1, 2), (3, 8), (5, 24))

size, address = ctypes.c_size_t, ctypes.c_void_p


class Loops(ctypes.Structure):
    """As in native/mask_loops.h."""

    _fields_ = [
        ("select_kept", ctypes.CFUNCTYPE(None, address, size, size, size, address, address, address)),
        ("kept_bf16", ctypes.CFUNCTYPE(None, address, address, size, address)),
        ("pull_pruned", ctypes.CFUNCTYPE(None, address, address, address, size, ctypes.c_float)),
    ]  # fmt: skip


def built(folder: Path, name: str) -> Any:
    """The loops of an instruction set, with the options that CMakeLists.txt has for it."""
    source, library = folder / "shim.cpp", folder / f"{name}.so"
    source.write_text(SHIM)
    words = ["g++", "-std=c++20", "-O3", "-fPIC", "-shared", f"-I{ROOT / 'native'}", *FLAGS[name], str(source)]
    subprocess.run([*words, "-o", str(library)], check=True)
    opened = ctypes.CDLL(str(library))
    opened.loops.restype = ctypes.POINTER(Loops)
    return opened.loops().contents


def found(loops: Any, weight: Tensor, gradient: Tensor) -> list[Tensor]:
    """All that they make of the weights."""
    made = []
    for n, m in PATTERNS:
        mask, keys = torch.zeros_like(weight, dtype=torch.bool), torch.zeros(m, dtype=torch.int32)
        kept, alone = (torch.zeros_like(weight, dtype=torch.bfloat16) for _ in range(2))
        pulled, addresses = gradient.clone(), (weight.data_ptr(), mask.data_ptr())
        groups = weight.numel() // m
        loops.select_kept(weight.data_ptr(), groups, m, n, keys.data_ptr(), mask.data_ptr(), kept.data_ptr())
        loops.kept_bf16(*addresses, weight.numel(), alone.data_ptr())
        loops.pull_pruned(pulled.data_ptr(), *addresses, weight.numel(), 2e-4)
        assert torch.equal(kept.view(torch.int16), alone.view(torch.int16))
        assert (mask.view(-1, m).sum(dim=1) == n).all()
        made += [mask, kept.view(torch.int16), pulled.view(torch.int32)]
    return made


@pytest.mark.slow
@pytest.mark.holds("fast.8")
@pytest.mark.parametrize("name", ["avx2", "avx512"])
def test_bits_are_those_of_the_plain_loops(name: str, tmp_path: Path) -> None:
    if platform.machine() != "x86_64" or name not in Path("/proc/cpuinfo").read_text().replace("avx512f", "avx512"):
        pytest.skip(f"needs {name}")
    torch.manual_seed(0)
    weight, gradient = torch.randn(96, 96), torch.randn(96, 96)
    edges = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-40, 3e38, -3e38, 1.5, -1.5, 2**-126])
    weight[:48] = edges[torch.randint(len(edges), (48, 96))]
    assert all(
        map(
            torch.equal,
            found(built(tmp_path, name), weight, gradient),
            found(built(tmp_path, "plain"), weight, gradient),
        )
    )
