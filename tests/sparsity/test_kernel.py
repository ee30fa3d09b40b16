"""The Triton kernel, by Triton's interpreter on a CPU, against torch's own operations, bit for bit."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

PATTERNS = ("1:2", "2:4", "2:32", "8:32", "5:24")
SCRIPT = """
import json, sys
import torch
from test_passes import by_sort, weights
from sparsemae.sparsity import NMPattern, hold_masks, passes, sparsify
from sparsemae.sparsity.kernel import select_in_one_pass
from sparsemae.sparsity.pattern import select_mask

wrong = []
for text in sys.argv[1:]:
    pattern = NMPattern.parse(text)
    weight = weights(24, 3 * pattern.m)
    for name, given in (("edges", weight), ("a NaN", weight.clone()), ("infinities", weight.clone())):
        if name == "a NaN":
            given[:, 1] = torch.tensor(float("nan"))
            given[3:9, 2:5] = torch.tensor([0x7FC00001, -0x3FFFFF, 0x7F800001], dtype=torch.int32).view(torch.float32)
        elif name == "infinities":
            given[::2, 2] = float("inf")
            given[::3, 4] = -float("inf")
        mask, kept = select_in_one_pass(given, pattern.n, pattern.m)
        wanted = select_mask(given.double(), pattern)
        same = torch.equal(mask, wanted) and (name != "edges" or torch.equal(mask, by_sort(given, pattern)))
        in_bf16 = torch.where(wanted, given, 0.0).bfloat16()
        if name == "a NaN":
            same &= torch.equal(kept.isnan(), in_bf16.isnan())
            kept, in_bf16 = kept.nan_to_num(), in_bf16.nan_to_num()
        if not same or not torch.equal(kept.view(torch.int16), in_bf16.view(torch.int16)):
            wrong.append(f"{text}, {name}")


def trained(by_kernel):
    passes.fits_kernel = lambda weight, n, m: by_kernel
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32))
    sparsify(model, "2:32", include=["0"])
    found = []
    with hold_masks(model), torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            out = model(torch.ones(3, 64))
            out.float().pow(2).sum().backward()
            found += [out, model[0].weight.grad.clone(), model[0].current_mask(), model[0].held_kept]
    assert model[0].held_kept is model[0].held_mask is None
    return found


ours, torchs = trained(True), trained(False)
if ours.pop() is None or torchs.pop() is not None:
    wrong.append("which way")
if not all(torch.equal(one, other) for one, other in zip(ours[:3], torchs[:3])):
    wrong.append("a training forward")
print(json.dumps(wrong))
"""


@pytest.mark.slow
@pytest.mark.holds("fast.7")
def test_masks_and_kept_weights_are_the_references() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT / 'tests/sparsity'}:{ROOT / 'tests'}"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *PATTERNS], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == []
