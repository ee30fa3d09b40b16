"""Group codes: which n of every m weights are kept, in as few bits as a fixed-length code allows.

The kept positions p_1 < ... < p_n of one group are one number, their rank among the C(m, n) combinations in the
combinatorial number system: ``rank = C(p_1, 1) + C(p_2, 2) + ... + C(p_n, n)``. It takes ``ceil(log2 C(m, n))`` bits: 9
for 2:32, 16 for 4:32. Where that would be more than 64 bits, the code is an m-bit bitmap instead (bit j = position j is
kept). The codes of all groups, in row-major order, form one bit stream, least significant bit first; the bits that fill
the last byte are zero.

Only numpy is imported: the runtime reads files with this module. The native library has its own, faster decoder;
this one is its reference.
"""

from functools import cache
from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray

MAX_GROUP = 256
"""Largest m that a code may have; a guard against absurd files, not a limit of the arithmetic."""

_TABLE_LIMIT = 1 << 16  # ranks below this are decoded by one table look-up
_CHUNK = 1 << 16  # groups per step; a multiple of 8, so that every chunk starts on a byte
_SATURATED = (1 << 64) - 1


def code_bits(n: int, m: int) -> int:
    """Bits of one group's code for the pattern n:m (n kept of every m)."""
    if not 1 <= n <= m <= MAX_GROUP:
        raise ValueError(f"pattern: wanted n:m with 1 <= n <= m <= {MAX_GROUP}, got {n}:{m}")
    bits = (comb(m, n) - 1).bit_length()
    return bits if bits <= 64 else m


def code_bytes(groups: int, n: int, m: int) -> int:
    """Bytes of the codes of ``groups`` groups."""
    return (groups * code_bits(n, m) + 7) // 8


def encode_mask(mask: NDArray[np.bool_], n: int, m: int) -> NDArray[np.uint8]:
    """Codes of a mask (True = kept).

    Args:
        mask: bool [O, I], exactly n True in every m consecutive entries of a row.

    Returns:
        uint8 [code_bytes(O * I / m, n, m)].

    Raises:
        ValueError: I is no multiple of m, or a group does not keep exactly n (row and group are named).
    """
    bits = code_bits(n, m)
    if mask.ndim != 2 or mask.dtype != np.bool_ or mask.shape[1] % m:
        raise ValueError(f"mask: wanted bool [O, I] with I a multiple of {m}, got {mask.dtype} {list(mask.shape)}")
    groups = mask.reshape(-1, m)
    kept = groups.sum(axis=1)
    if (bad := np.flatnonzero(kept != n)).size:
        row, group = divmod(int(bad[0]), mask.shape[1] // m)
        raise ValueError(f"row {row}, group {group}: wanted {n} of {m} kept, got {kept[bad[0]]}")
    if bits == 0:
        return np.zeros(0, np.uint8)
    if bits == m:  # a bitmap: a rank takes fewer bits
        return np.packbits(groups, bitorder="little")
    parts = []
    for start in range(0, len(groups), _CHUNK):
        positions = np.nonzero(groups[start : start + _CHUNK])[1].reshape(-1, n)
        parts.append(_pack_bits(_rank(positions, n, m), bits))
    return np.concatenate(parts) if parts else np.zeros(0, np.uint8)


def decode_positions(codes: NDArray[np.uint8], groups: int, n: int, m: int) -> NDArray[np.uint16]:
    """Kept positions within each group, ascending.

    Args:
        codes: uint8, as ``encode_mask`` returns them.

    Returns:
        uint16 [groups, n].

    Raises:
        ValueError: wrong number of bytes, a code out of range, or padding bits that are not zero.
    """
    bits = code_bits(n, m)
    expected = code_bytes(groups, n, m)
    if codes.dtype != np.uint8 or codes.ndim != 1 or codes.size != expected:
        raise ValueError(
            f"codes: wanted {expected} bytes for {groups} groups of {n}:{m}, got {codes.dtype} {list(codes.shape)}"
        )
    if (spare := groups * bits % 8) and codes[-1] >> spare:
        raise ValueError(f"codes of {n}:{m}: wanted padding bits of 0, got {codes[-1] >> spare:b}")
    if bits == 0:
        return np.tile(np.arange(m, dtype=np.uint16), (groups, 1))
    out = np.empty((groups, n), np.uint16)
    for start in range(0, groups, _CHUNK):
        count = min(_CHUNK, groups - start)
        chunk = codes[start * bits // 8 : ((start + count) * bits + 7) // 8]
        if bits == m:  # a bitmap: a rank takes fewer bits
            bitmap = np.unpackbits(chunk, count=count * m, bitorder="little").reshape(count, m)
            kept = bitmap.sum(axis=1, dtype=np.int64)
            if (bad := np.flatnonzero(kept != n)).size:
                raise ValueError(f"code of group {start + bad[0]}: wanted {n} of {m} kept, got {kept[bad[0]]}")
            out[start : start + count] = np.nonzero(bitmap)[1].reshape(count, n)
        else:
            ranks = _unpack_bits(chunk, count, bits)
            if (bad := np.flatnonzero(ranks > np.uint64(comb(m, n) - 1))).size:
                raise ValueError(
                    f"code of group {start + bad[0]}: wanted less than {comb(m, n)} for {n}:{m}, got {ranks[bad[0]]}"
                )
            out[start : start + count] = _unrank(ranks, n, m)
    return out


def decode_mask(codes: NDArray[np.uint8], rows: int, columns: int, n: int, m: int) -> NDArray[np.bool_]:
    """The mask that ``encode_mask`` was given: bool [rows, columns], True = kept. Raises as ``decode_positions``."""
    if columns % m:
        raise ValueError(f"mask: wanted rows of a multiple of {m}, got {columns}")
    mask = np.zeros((rows * columns // m, m), np.bool_)
    np.put_along_axis(mask, decode_positions(codes, len(mask), n, m).astype(np.int64), True, axis=1)
    return mask.reshape(rows, columns)


@cache
def _binomials(n: int, m: int) -> NDArray[np.uint64]:
    """uint64 [n + 1, m]: entry (i, p) is C(p, i), saturated; the saturated ones are never reached by a valid rank."""
    return np.array([[min(comb(p, i), _SATURATED) for p in range(m)] for i in range(n + 1)], dtype=np.uint64)


@cache
def _combination_table(n: int, m: int) -> NDArray[np.uint16]:
    """uint16 [C(m, n), n]: the positions of every rank."""
    table = np.array(list(combinations(range(m), n)), dtype=np.uint16)
    return table[np.argsort(_rank(table.astype(np.int64), n, m))]


def _rank(positions: NDArray[np.int64], n: int, m: int) -> NDArray[np.uint64]:
    binomials = _binomials(n, m)
    rank = np.zeros(len(positions), np.uint64)
    for i in range(n):
        rank += binomials[i + 1][positions[:, i]]
    return rank


def _unrank(ranks: NDArray[np.uint64], n: int, m: int) -> NDArray[np.uint16]:
    if comb(m, n) <= _TABLE_LIMIT:
        return _combination_table(n, m)[ranks]
    binomials = _binomials(n, m)
    positions = np.empty((len(ranks), n), np.uint16)
    rest = ranks.copy()
    for i in range(n, 0, -1):  # greedy: the largest p with C(p, i) <= rest
        place = np.searchsorted(binomials[i][: m - n + i], rest, side="right") - 1
        positions[:, i - 1] = place
        rest -= binomials[i][place]
    return positions


def _pack_bits(values: NDArray[np.uint64], bits: int) -> NDArray[np.uint8]:
    octets = values.astype("<u8").view(np.uint8).reshape(-1, 8)
    return np.packbits(np.unpackbits(octets, axis=1, count=bits, bitorder="little"), bitorder="little")


def _unpack_bits(stream: NDArray[np.uint8], count: int, bits: int) -> NDArray[np.uint64]:
    table = np.unpackbits(stream, count=count * bits, bitorder="little").reshape(count, bits)
    packed = np.packbits(table, axis=1, bitorder="little")
    return np.pad(packed, ((0, 0), (0, 8 - packed.shape[1]))).view("<u8").reshape(-1).astype(np.uint64)
