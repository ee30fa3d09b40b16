"""The group codes: exact both ways, as short as promised, and hostile codes refused."""

from math import ceil, comb, log2

import numpy as np
import pytest

from sparsemae.packing.codec import code_bits, code_bytes, decode_mask, decode_positions, encode_mask

PATTERNS = [
    (1, 1),
    (1, 2),
    (2, 4),
    (2, 32),
    (4, 32),
    (8, 32),
    (16, 32),
    (31, 32),
    (32, 32),
    (3, 7),
    (5, 48),
    (20, 64),
    (32, 64),
    (33, 67),
    (40, 80),
]


def random_mask(rows: int, groups: int, n: int, m: int, seed: int = 0) -> np.ndarray:
    order = np.argsort(np.random.default_rng(seed).random((rows * groups, m)), axis=1)
    return (order < n).reshape(rows, groups * m)


def slow_rank(positions: list[int]) -> int:
    return sum(comb(p, i + 1) for i, p in enumerate(positions))


def test_bits_of_the_paper_patterns() -> None:
    assert (code_bits(2, 32), code_bits(4, 32)) == (9, 16)
    assert code_bits(32, 64) == ceil(log2(comb(64, 32)))
    assert code_bits(40, 80) == 80  # a bitmap


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_round_trip(n: int, m: int) -> None:
    mask = random_mask(5, 13, n, m)
    codes = encode_mask(mask, n, m)
    assert codes.size == code_bytes(5 * 13, n, m)
    assert (decode_mask(codes, 5, 13 * m, n, m) == mask).all()


def test_many_groups_cross_chunks() -> None:
    mask = random_mask(1024, 70, 4, 8)
    assert (decode_mask(encode_mask(mask, 4, 8), 1024, mask.shape[1], 4, 8) == mask).all()


@pytest.mark.parametrize(("n", "m"), [(2, 6), (3, 7)])
def test_rank_is_the_combinatorial_number_system(n: int, m: int) -> None:
    mask = random_mask(1, 50, n, m)
    bits = code_bits(n, m)
    stream = int.from_bytes(encode_mask(mask, n, m).tobytes(), "little")
    for group, row in enumerate(mask.reshape(-1, m)):
        assert stream >> (group * bits) & ((1 << bits) - 1) == slow_rank(list(np.flatnonzero(row)))


def test_wrong_group_is_named() -> None:
    mask = random_mask(3, 4, 2, 8)
    mask[1, 16:24] = True
    with pytest.raises(ValueError, match="row 1, group 2: wanted 2 of 8 kept, got 8"):
        encode_mask(mask, 2, 8)


def test_hostile_codes_are_refused() -> None:
    with pytest.raises(ValueError, match="wanted less than 496 for 2:32, got"):
        decode_positions(np.full(9, 255, np.uint8), 8, 2, 32)
    with pytest.raises(ValueError, match="codes: wanted 9 bytes"):
        decode_positions(np.zeros(8, np.uint8), 8, 2, 32)
    with pytest.raises(ValueError, match="padding"):
        decode_positions(np.array([0, 128], np.uint8), 1, 2, 32)
    with pytest.raises(ValueError, match="wanted 40 of"):
        decode_positions(np.zeros(80, np.uint8), 8, 40, 80)
    with pytest.raises(ValueError, match="1 <= n <= m"):
        code_bits(5, 4)
