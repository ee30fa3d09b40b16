"""What compilers make of the hot loops of sparse products, and what llvm-mca says of them: `make hot-loops`.

    python tools/hot_loops.py native/README.md

For processors that are not at hand: multiply-adds a cycle if all inputs come from the first-level cache. The table goes
between the marks of the file.
"""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLAGS = ("-std=c++20", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno")  # as CMakeLists.txt has them
ANALYZER = "llvm-mca-19"
MARKS = ("<!-- table of make hot-loops -->\n", "<!-- end -->")
JUMP = re.compile(r"\s+(?:j\w+|b\.?\w*|cbn?z\s+\w+,|tbn?z\s+\w+, #?\d+,)\s+(\.L\w+)$")

INPUT = re.compile(r"\[x\d|\((?!%rsp|%rbp)%r")


@dataclass(frozen=True)
class Product:
    """What the hot loops of one file are made of: so many instructions, each of `lanes` multiply-adds."""

    file: str
    instruction: str
    counts: tuple[int, ...]
    lanes: int
    compilers: dict[str, str]
    processors: tuple[str, ...]


def arm(gcc: str = "", clang: str = "") -> dict[str, str]:
    """Compilers, and what each is told beside FLAGS."""
    return {
        "aarch64-linux-gnu-g++": f"-fno-schedule-insns {gcc}",
        "clang++-19": f"--target=aarch64-linux-gnu {clang}",
    }


def x86(flags: str) -> dict[str, str]:
    """As `arm`."""
    return dict.fromkeys(("g++", "clang++-19"), flags)


NEOVERSE = ("neoverse-n1", "neoverse-v2")
FP16 = arm("-march=armv8.2-a+fp16", "-Xclang -target-feature -Xclang +fullfp16")
PRODUCTS = (
    Product("kernels_neon.cpp", r"fmla\s+v\d+\.4s, v\d+\.4s, v\d+\.s\[", (24, 20), 4, arm(), NEOVERSE),
    Product("kernels_neonfp16.cpp", r"fmla\s+v\d+\.8h, ", (24, 20), 8, FP16, NEOVERSE),
    Product("kernels_avxvnni.cpp", r"(\{vex\}\s+)?vpdpbusd\s", (8,), 32, x86("-mavx2 -mfma -mavxvnni"), ("alderlake",)),
    Product("kernels_avx2.cpp", r"vfmadd231ps\s", (14,), 8, x86("-mavx2 -mfma"), ("alderlake",)),
)


def loops(assembly: str) -> list[list[str]]:
    """The lines of each innermost loop: from a label to the last jump back to it, without another loop in between."""
    lines = [re.split(r"# |// ", line)[0].rstrip() for line in assembly.splitlines()]
    labels = {line[:-1]: i for i, line in enumerate(lines) if re.match(r"\.L\w+:$", line)}
    jumps = [
        (labels[match[1]], i)
        for i, line in enumerate(lines)
        if (match := JUMP.match(line)) and labels.get(match[1], i) < i
    ]
    inner = [
        (begin, end)
        for begin, end in jumps
        if not any(begin <= other and last <= end and (begin, end) != (other, last) for other, last in jumps)
    ]
    return [lines[begin : end + 1] for begin, end in inner]


def instructions(body: list[str]) -> list[str]:
    """A loop's lines without labels and directives."""
    return [line for line in body if re.match(r"\s+[a-z{]", line)]


def assembly(compiler: str, flags: str, file: str) -> str:
    """What a compiler makes of a file of native/."""
    command = [compiler, *FLAGS, *flags.split(), "-S", str(ROOT / "native" / file), "-o", "-"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


def hot_loops(product: Product, compiler: str) -> list[tuple[int, list[str]]]:
    """The loops over whole blocks of rows and tokens, each with the multiply-adds of a time around."""
    text = assembly(compiler, product.compilers[compiler], product.file)
    pattern = re.compile(rf"\s+{product.instruction}")
    found = [(sum(map(bool, map(pattern.match, body))), body) for body in loops(text)]
    return [
        (count * product.lanes, body)
        for count, body in found
        if count in product.counts and any(map(INPUT.search, body))  # not one that measures the peak
    ]


def cycles(body: list[str], processor: str) -> float:
    """Cycles of one time around, as llvm-mca sees them."""
    rounds = 1000
    triple = "aarch64" if processor in NEOVERSE else "x86_64"
    command = [ANALYZER, f"-mtriple={triple}", f"-mcpu={processor}", f"-iterations={rounds}"]
    done = subprocess.run(command, input="\n".join(body), capture_output=True, text=True, check=True)
    match = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
    assert match
    return int(match[1]) / rounds


def costs(
    product: Product, bodies: list[tuple[int, list[str]]], analyze: bool = True
) -> tuple[float, dict[str, float]]:
    """Of the worst of a file's hot loops: instructions for a multiply-add, and multiply-adds a cycle by processor."""
    return max(len(instructions(body)) / work for work, body in bodies), {
        processor: min(work / cycles(body, processor) for work, body in bodies)
        for processor in product.processors
        if analyze
    }


def table() -> str:
    """What every file's hot loops cost."""
    lines = ["| kernels | compiler | instructions for a multiply-add | multiply-adds a cycle |", "|---|---|---:|---|"]
    for product in PRODUCTS:
        for compiler in product.compilers:
            count, speeds = costs(product, hot_loops(product, compiler))
            speed = ", ".join(f"{processor} {speed:.1f}" for processor, speed in speeds.items())
            lines.append(f"| {product.file[8:-4]} | {compiler} | {count:.2f} | {speed} |")
    return "\n".join(lines)


if __name__ == "__main__":
    readme = Path(sys.argv[1])
    before, mark, rest = readme.read_text().partition(MARKS[0])
    assert mark, f"{readme}: no line {MARKS[0]}"
    readme.write_text(f"{before}{mark}\n{table()}\n\n{MARKS[1]}{rest.partition(MARKS[1])[2]}")
