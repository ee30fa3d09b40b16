"""What compilers make of the hot loops: the sums stay in registers.

A loop over an array of sums that is not unrolled, or more sums than the compiler finds registers for, and every
multiply-add is followed by a store: it was so once, and cost two thirds of the speed.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
AVX512 = "-mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16"
FLAGS = {
    "kernels_avx512bf16.cpp": AVX512,
    "kernels_avx512vnni.cpp": f"{AVX512} -mavx512vnni -mavx512vbmi",
    "kernels_amxvnni.cpp": f"{AVX512} -mavx512vnni -mavx512vbmi -mamx-tile -mamx-bf16",
}
COMPILERS = [name for name in ("g++", "clang++-19", "clang++") if shutil.which(name)]
PRODUCT = re.compile(r"^\s+(vdpbf16ps|vpdpbusd)\s")
STORE = re.compile(r"^\s+vmov\w+\s+%[xyz]mm\d+, [^%]*\(")


def loops(assembly: str) -> list[list[str]]:
    """The lines of each innermost loop: from a label to the last jump back to it, without another loop in between."""
    lines = [line.split("#")[0].rstrip() for line in assembly.splitlines()]
    labels = {line[:-1]: i for i, line in enumerate(lines) if re.match(r"\.L\w+:$", line)}
    jumps = [
        (labels[match[1]], i)
        for i, line in enumerate(lines)
        if (match := re.match(r"\s+j\w+\s+(\.L\w+)$", line)) and labels.get(match[1], i) < i
    ]
    inner = [
        (begin, end)
        for begin, end in jumps
        if not any(begin <= other and last <= end and (begin, end) != (other, last) for other, last in jumps)
    ]
    return [lines[begin:end] for begin, end in inner]


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("file", FLAGS)
@pytest.mark.slow
def test_sums_stay_in_registers(compiler: str, file: str, tmp_path: Path) -> None:
    command = [
        compiler,
        "-std=c++20",
        "-O3",
        "-fPIC",
        "-ffp-contract=off",
        "-fno-math-errno",
        *FLAGS[file].split(),
        "-S",
    ]
    done = subprocess.run(
        [*command, ROOT / "native" / file, "-o", tmp_path / "out.s"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    hot = [body for body in loops((tmp_path / "out.s").read_text()) if sum(map(bool, map(PRODUCT.match, body))) >= 16]
    assert hot
    for body in hot:
        stores = [line for line in body if STORE.match(line)]
        assert not stores, "\n".join(body)


def test_stores_are_noticed() -> None:
    products = "\tvdpbf16ps\t%zmm1, %zmm2, %zmm3\n"
    body = f".L3:\n{products * 16}\tvmovaps\t%zmm3, -64(%rsp)\n\tjne\t.L3\n"
    ((*lines,),) = loops(body)
    assert [line for line in lines if STORE.match(line)]
