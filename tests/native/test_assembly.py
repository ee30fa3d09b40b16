"""What compilers make of the hot loops: the sums stay in registers, and little is done beside the products.

A loop over an array of sums that is not unrolled, or more sums than the compiler finds registers for, and every
multiply-add is followed by a store: it was so once, and cost two thirds of the speed.
"""

import re
import shutil
import sys

import pytest
from conftest import ROOT, Figure

sys.path.insert(0, str(ROOT / "tools"))

from hot_loops import ANALYZER, PRODUCTS, Product, assembly, costs, hot_loops, loops

AVX512 = "-mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16"
FLAGS = {
    "kernels_avx512bf16.cpp": AVX512,
    "kernels_avx512vnni.cpp": f"{AVX512} -mavx512vnni -mavx512vbmi",
    "kernels_amxvnni.cpp": f"{AVX512} -mavx512vnni -mavx512vbmi -mamx-tile -mamx-bf16",
}
COMPILERS = [name for name in ("g++", "clang++-19", "clang++") if shutil.which(name)]
PRODUCT = re.compile(r"^\s+(vdpbf16ps|vpdpbusd)\s")
STORE = re.compile(r"^\s+(vmov\w+\s+%[xyz]mm\d+, [^%]*\(|st[rpu]\w*\s)")
HOLDS_ONLY = [pytest.mark.holds_only]
CASES = [
    pytest.param(product, compiler, id=f"{product.file}, {compiler}", marks=[] if "linux" in compiler else HOLDS_ONLY)
    for product in PRODUCTS
    for compiler in product.compilers
]
BARS: dict[str, tuple[float, dict[str, float]]] = {
    "kernels_neon.cpp": (0.55, {"neoverse-n1": 6, "neoverse-v2": 9}),
    "kernels_neonfp16.cpp": (0.55, {"neoverse-n1": 10, "neoverse-v2": 15}),
    "kernels_avxvnni.cpp": (0.2, {"alderlake": 28}),
    "kernels_avx2.cpp": (0.3, {"alderlake": 12}),
}
"""Instructions for a multiply-add at most, multiply-adds a cycle at least."""


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("file", FLAGS)
@pytest.mark.slow
def test_sums_stay_in_registers(compiler: str, file: str) -> None:
    bodies = loops(assembly(compiler, FLAGS[file], file))
    hot = [body for body in bodies if sum(map(bool, map(PRODUCT.match, body))) >= 16]
    assert hot
    for body in hot:
        stores = [line for line in body if STORE.match(line)]
        assert not stores, "\n".join(body)


@pytest.mark.slow
@pytest.mark.holds("fast.4")
@pytest.mark.parametrize(("product", "compiler"), CASES)
def test_little_is_done_beside_the_products(product: Product, compiler: str, figure: Figure) -> None:
    if not shutil.which(compiler):
        pytest.skip(f"needs {compiler}")
    bodies = hot_loops(product, compiler)
    for _, body in bodies:
        assert not [line for line in body if STORE.match(line)], "\n".join(body)
    count, speeds = costs(product, bodies, analyze=bool(shutil.which(ANALYZER)))
    figure(f"{count:.2f} instructions for a multiply-add; multiply-adds a cycle: {speeds}")
    most, least = BARS[product.file]
    assert count <= most
    for processor, speed in speeds.items():
        assert speed >= least[processor], processor


def test_stores_are_noticed() -> None:
    products = "\tvdpbf16ps\t%zmm1, %zmm2, %zmm3\n"
    body = f".L3:\n{products * 16}\tvmovaps\t%zmm3, -64(%rsp)\n\tjne\t.L3\n"
    ((*lines,),) = loops(body)
    assert [line for line in lines if STORE.match(line)]
