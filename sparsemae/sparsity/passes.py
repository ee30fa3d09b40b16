"""A training step's passes over the latent weights, on a CPU in one reading each: native/masks.h.

As operators of torch, so that fake tensors and torch.compile know their shapes. Each gives the very bits of the torch
operations it stands for, but for `pull_pruned`, whose product is rounded before it is added.
"""

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

MOST_KEPT = 8
"""Of a group; beyond it a sort is faster."""
LARGEST_GROUP = 1024
"""That the kernel holds in registers."""
USE_KERNEL = False
"""Select by `kernel` on a CUDA device; torch's operations do until `make gpu` has measured it faster there."""


@cache
def _library() -> Any:
    """The native library; None in a checkout where it is not built, as on a machine that only trains on a GPU."""
    try:
        from sparsemae.runtime import native
    except ImportError:
        return None
    return native


def fits(*tensors: Tensor) -> bool:
    """Whether the passes take them: whole fp32 tensors in the CPU's memory."""
    return _library() is not None and all(
        tensor.device.type == "cpu"
        and tensor.dtype is torch.float32
        and tensor.is_contiguous()
        and not hasattr(tensor, "device_mesh")  # divided by FSDP2
        for tensor in tensors
    )


def selects(weight: Tensor, n: int, m: int) -> bool:
    """Whether `select_kept` takes them."""
    return n <= min(MOST_KEPT, m - 1) and fits(weight)


def fits_kernel(weight: Tensor, n: int, m: int) -> bool:
    """Whether the kernel on a CUDA device takes them, and is to."""
    return (
        USE_KERNEL
        and weight.is_cuda
        and weight.dtype is torch.float32
        and weight.is_contiguous()
        and not hasattr(weight, "device_mesh")
        and n <= min(MOST_KEPT, m - 1)
        and m <= LARGEST_GROUP
        and find_spec("triton") is not None
    )


@torch.library.custom_op("sparsemae::select_kept", mutates_args=())
def select_kept(weight: Tensor, n: int, m: int) -> Tensor:
    """Of every m the n of largest magnitude, of equal ones the first: bool, in the shape of ``weight``."""
    mask = torch.empty(weight.shape, dtype=torch.bool)
    groups, threads = weight.numel() // m, torch.get_num_threads()
    _library().run("select_kept", weight.data_ptr(), groups, m, n, threads, mask.data_ptr(), None)
    return mask


@select_kept.register_fake
def _(weight: Tensor, n: int, m: int) -> Tensor:
    return torch.empty_like(weight, dtype=torch.bool)


@torch.library.custom_op("sparsemae::select_kept_bf16", mutates_args=())
def select_kept_bf16(weight: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """`select_kept`, and `kept_bf16` of it, in one pass."""
    mask, kept = torch.empty(weight.shape, dtype=torch.bool), torch.empty(weight.shape, dtype=torch.bfloat16)
    groups, threads = weight.numel() // m, torch.get_num_threads()
    _library().run("select_kept", weight.data_ptr(), groups, m, n, threads, mask.data_ptr(), kept.data_ptr())
    return mask, kept


@select_kept_bf16.register_fake
def _(weight: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight, dtype=torch.bool), torch.empty_like(weight, dtype=torch.bfloat16)


@torch.library.custom_op("sparsemae::kept_bf16", mutates_args=())
def kept_bf16(weight: Tensor, mask: Tensor) -> Tensor:
    """Kept weights in bf16, the others 0."""
    kept = torch.empty(weight.shape, dtype=torch.bfloat16)
    addresses = weight.data_ptr(), mask.data_ptr(), weight.numel()
    _library().run("kept_bf16", *addresses, torch.get_num_threads(), kept.data_ptr())
    return kept


@kept_bf16.register_fake
def _(weight: Tensor, mask: Tensor) -> Tensor:
    return torch.empty_like(weight, dtype=torch.bfloat16)


@torch.library.custom_op("sparsemae::pull_pruned", mutates_args=("gradient",))
def pull_pruned(gradient: Tensor, weight: Tensor, mask: Tensor, strength: float) -> None:
    """Add ``strength`` times the pruned weights to their gradients."""
    addresses = gradient.data_ptr(), weight.data_ptr(), mask.data_ptr(), weight.numel()
    _library().run("pull_pruned", *addresses, strength, torch.get_num_threads())


@pull_pruned.register_fake
def _(gradient: Tensor, weight: Tensor, mask: Tensor, strength: float) -> None:
    return None
