"""A training step's pass over the latent weights on a CUDA device, in one reading: a Triton kernel.

It gives the bits of torch's operations: magnitudes are compared as integers, which order non-negative floats as their
values do, denormals included; every NaN counts as the largest, as in ``torch.max``; of equal ones the first is kept.
Each group is in registers, so that the kept weights in bf16 are written without another reading, or a copy in fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS = 4096  # that one program holds


@triton.jit  # type: ignore[untyped-decorator]
def _select(  # type: ignore[no-untyped-def]
    weights, masks, kept, groups, N: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    there = (row < groups) & (column < M)
    weight = tl.load(weights + row * M + column, mask=there, other=0.0)
    size = tl.minimum(weight.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x7F800001)  # one value for every NaN
    rank = tl.where(there, size.to(tl.int64) * WIDTH + (WIDTH - 1 - column), -1)
    for _ in tl.static_range(N):
        rank = tl.where(rank == tl.max(rank, axis=1)[:, None], -2, rank)
    chosen = there & (rank == -2)
    tl.store(masks + row * M + column, chosen, mask=there)
    # to nearest, ties to even, in integers: Triton's interpreter would cut off
    bits = tl.where(chosen, weight, 0.0).to(tl.int32, bitcast=True)
    rounded = tl.where(size > 0x7F800000, 0x7FC00000, bits + 0x7FFF + ((bits >> 16) & 1))
    tl.store(kept + row * M + column, tl.where(chosen, rounded >> 16, 0).to(tl.int16), mask=there)


@torch.library.custom_op("sparsemae::select_in_one_pass", mutates_args=())
def select_in_one_pass(weight: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Which weights are kept, bool, and the kept ones in bf16, the others 0; both in the shape of ``weight``.

    Args:
        weight: fp32, contiguous, its last dimension a multiple of m.
        n: kept, fewer than m; each costs a pass over the registers.
    """
    mask, kept = torch.empty_like(weight, dtype=torch.bool), torch.empty_like(weight, dtype=torch.bfloat16)
    groups, width = weight.numel() // m, triton.next_power_of_2(m)
    rows = max(1, _ELEMENTS // width)
    with torch.cuda.device_of(weight):  # type: ignore[no-untyped-call]
        _select[(triton.cdiv(groups, rows),)](weight, mask, kept.view(torch.int16), groups, n, m, width, rows)
    return mask, kept


@select_in_one_pass.register_fake
def _(weight: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight, dtype=torch.bool), torch.empty_like(weight, dtype=torch.bfloat16)
