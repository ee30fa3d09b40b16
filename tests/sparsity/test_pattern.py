from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from sparsemae.sparsity import NMPattern, nm_mask

PATTERNS = ["1:4", "2:4", "3:7", "2:32", "4:32", "8:32", "9:32", "16:32", "31:32", "32:32", "1:1"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LEVELS = [-0.5, -0.25, -0.0, 0.0, 0.25, 0.5]


def slow_mask(weight: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """The slow twin: one group after the other, a stable numpy sort of the magnitudes."""
    rows = weight.detach().to(torch.float64).numpy().reshape(-1, weight.shape[-1])
    mask = np.zeros(rows.shape, dtype=bool)
    for i, row in enumerate(rows):
        for start in range(0, len(row), m):
            order = np.argsort(-np.abs(row[start : start + m]), kind="stable")
            mask[i, start + order[:n]] = True
    return torch.from_numpy(mask.reshape(tuple(weight.shape)))


def make_weight(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape) + shape[-1])
    if kind == "normal":
        return torch.randn(shape, generator=generator).to(dtype)
    if kind == "levels":  # a few levels: every group has ties, also between signs and between the two zeros
        return torch.tensor(LEVELS, dtype=dtype)[torch.randint(len(LEVELS), shape, generator=generator)]
    if kind == "negative":
        return -torch.rand(shape, generator=generator).to(dtype)
    return torch.full(shape, {"zero": 0.0, "minus zero": -0.0}[kind], dtype=dtype)


@pytest.mark.parametrize(("text", "n", "m"), [("2:32", 2, 32), (" 4:32 ", 4, 32), ("32:32", 32, 32), ("1:1", 1, 1)])
def test_parse_reads_n_kept_of_every_m(text, n, m):
    pattern = NMPattern.parse(text)
    assert (pattern.n, pattern.m) == (n, m)
    assert str(pattern) == text.strip()
    assert pattern.density == n / m
    assert NMPattern.parse(pattern) is pattern
    assert pattern == NMPattern(n, m)
    assert hash(pattern) == hash(NMPattern(n, m))


def test_density_is_the_share_that_is_kept():
    assert NMPattern(2, 32).density == 1 / 16
    assert NMPattern(4, 32).density == 1 / 8
    assert NMPattern(32, 32).density == 1.0


@pytest.mark.parametrize(
    ("text", "got"),
    [("0:4", "n=0, m=4"), ("-1:4", "n=-1, m=4"), ("5:4", "n=5, m=4"), ("2:0", "n=2, m=0"), ("2:-4", "n=2, m=-4")],
)
def test_numbers_out_of_range_are_refused(text, got):
    with pytest.raises(ValueError, match=rf"N:M pattern: wanted 1 <= n <= m \(n kept of every m\), got {got}$"):
        NMPattern.parse(text)


@pytest.mark.parametrize(("n", "m"), [(0, 4), (-2, 4), (5, 4), (0, 0)])
def test_the_constructor_refuses_too(n, m):
    with pytest.raises(ValueError, match=f"wanted 1 <= n <= m .* got n={n}, m={m}"):
        NMPattern(n, m)


@pytest.mark.parametrize(
    "text", ["", "dense", "2", "2/32", "2:", ":32", "2:32:64", "2.0:4", "2: 32", "two:four", "0x2:4"]
)
def test_text_that_is_not_n_colon_m_is_refused(text):
    wanted = 'N:M pattern: wanted "n:m" (n kept of every m, for example "2:32"), got '
    with pytest.raises(ValueError, match=f"^{re.escape(wanted + repr(text))}$"):
        NMPattern.parse(text)


@pytest.mark.parametrize("kind", ["normal", "levels", "negative", "zero", "minus zero"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", PATTERNS)
def test_mask_equals_its_slow_twin(text, dtype, kind):
    pattern = NMPattern.parse(text)
    weight = make_weight(kind, (5, 3 * pattern.m), dtype)
    mask = nm_mask(weight, pattern)
    assert mask.dtype == torch.bool
    assert mask.shape == weight.shape
    assert (mask.reshape(-1, pattern.m).sum(dim=1) == pattern.n).all()
    assert torch.equal(mask, slow_mask(weight, pattern.n, pattern.m))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_mask_on_a_gpu_is_the_mask_on_the_cpu():
    for pattern in map(NMPattern.parse, PATTERNS):
        for dtype in DTYPES:
            weight = make_weight("levels", (64, 5 * pattern.m), dtype)
            assert torch.equal(nm_mask(weight.cuda(), pattern).cpu(), slow_mask(weight, pattern.n, pattern.m))


@pytest.mark.parametrize("text", ["2:4", "16:32"])
def test_ties_keep_the_lower_index(text):
    pattern = NMPattern.parse(text)
    mask = nm_mask(torch.full((3, 2 * pattern.m), -0.125), pattern).reshape(-1, pattern.m)
    assert mask[:, : pattern.n].all()
    assert not mask[:, pattern.n :].any()


@pytest.mark.parametrize("text", ["1:4", "2:4", "16:32"])
@pytest.mark.parametrize("kind", ["normal", "levels"])
def test_more_dimensions_and_foreign_memory_layouts(text, kind):
    pattern = NMPattern.parse(text)
    m, n = pattern.m, pattern.n
    cube = make_weight(kind, (2, 3, 2 * m), torch.float32)
    transposed = make_weight(kind, (2 * m, 6), torch.float32).t()
    strided = make_weight(kind, (6, 4 * m), torch.float32)[::2, ::2]
    flat = make_weight(kind, (3 * m,), torch.float32)
    assert not transposed.is_contiguous()
    assert not strided.is_contiguous()
    for weight in (cube, transposed, strided, cube.transpose(0, 1), flat):
        before = weight.clone()
        assert torch.equal(nm_mask(weight, pattern), slow_mask(weight, n, m))
        assert torch.equal(weight, before)


def test_the_weight_is_left_alone_and_needs_no_gradient():
    weight = torch.nn.Parameter(torch.rand(4, 8))  # positive: abs() must not alias it
    before, version = weight.detach().clone(), weight._version
    assert not nm_mask(weight, NMPattern(2, 4)).requires_grad
    assert torch.equal(weight, before)
    assert weight._version == version


@pytest.mark.parametrize("text", ["1:4", "2:4", "16:32"])
def test_a_criterion_decides_and_may_return_the_weight_itself(text):
    pattern = NMPattern.parse(text)
    weight = make_weight("normal", (5, 2 * pattern.m), torch.float32)
    before = weight.clone()
    mask = nm_mask(weight, pattern, criterion=lambda own: own)  # signed: the most negative of all loses
    assert torch.equal(weight, before)
    groups, kept = weight.reshape(-1, pattern.m), mask.reshape(-1, pattern.m)
    lowest_kept = groups.masked_fill(~kept, torch.inf).min(dim=1).values
    assert (lowest_kept >= groups.masked_fill(kept, -torch.inf).max(dim=1).values).all()
    assert not torch.equal(mask, nm_mask(weight, pattern))


@pytest.mark.parametrize(
    ("criterion", "wanted"),
    [
        (lambda weight: weight.abs()[:1], r"fc1: criterion: wanted floating-point scores \[2, 4\], got .*\[1, 4\]"),
        (lambda weight: weight > 0, r"fc1: criterion: wanted floating-point scores \[2, 4\], got torch.bool"),
        (lambda weight: weight / 0, "fc1: criterion: wanted finite scores"),
    ],
)
def test_scores_that_are_none_are_refused(criterion, wanted):
    with pytest.raises(ValueError, match=wanted):
        nm_mask(torch.ones(2, 4), NMPattern(2, 4), "fc1", criterion)


def test_groups_run_along_the_inputs():
    weight = torch.tensor([[9.0, 8.0, 1.0, 2.0], [1.0, 1.0, 7.0, 1.0]])
    assert nm_mask(weight, NMPattern(1, 2)).tolist() == [[True, False, False, True], [True, False, True, False]]


@pytest.mark.parametrize(("shape", "text"), [((4, 6), "2:4"), ((2, 48), "2:32"), ((8, 12), "4:8"), ((4, 30), "32:32")])
def test_groups_never_cross_rows(shape, text):
    """In each case ``m`` divides the number of weights, so a reshape of the whole weight would pass unseen."""
    pattern = NMPattern.parse(text)
    if text != "32:32":
        assert (shape[0] * shape[1]) % pattern.m == 0
    wanted = f"pattern {text} wants in_features divisible by {pattern.m}, got in_features={shape[1]}"
    with pytest.raises(ValueError, match=rf"^blocks\.3\.mlp\.fc1: {wanted}$"):
        nm_mask(torch.ones(shape), pattern, "blocks.3.mlp.fc1")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_that_are_not_finite_are_refused(bad, dtype):
    weight = torch.ones(4, 8, dtype=dtype)
    weight[2, 5] = bad
    with pytest.raises(ValueError, match=rf"^blocks\.0\.attn\.qkv: wanted finite weights, got {bad} at \[2, 5\]$"):
        nm_mask(weight, NMPattern(2, 4), "blocks.0.attn.qkv")
