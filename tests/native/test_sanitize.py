"""The native tests again, under the address and undefined-behavior sanitizers: `make sanitize`, some minutes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def library(name: str) -> str:
    return subprocess.run(
        ["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.slow
@pytest.mark.skipif(
    "SPARSEMAE_TEST_SANITIZE" not in os.environ, reason="set SPARSEMAE_TEST_SANITIZE=1 (make sanitize does)"
)
@pytest.mark.holds("packed.8")
def test_native_code_under_sanitizers(tmp_path: Path) -> None:
    build = ROOT / "build" / "sanitize"
    cmake = ["cmake", "-S", str(ROOT), "-B", str(build), "-DSPARSEMAE_SANITIZE=ON"]
    subprocess.run(cmake, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", str(build), "-j2"], check=True, capture_output=True)
    shutil.copytree(
        ROOT / "sparsemae", tmp_path / "sparsemae", ignore=shutil.ignore_patterns("libsparsemae*", "__pycache__")
    )
    for built in build.glob("libsparsemae*"):
        shutil.copy(built, tmp_path / "sparsemae" / "runtime")
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    environment = os.environ | {
        "LD_PRELOAD": f"{library('libasan.so')} {library('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself never frees some of its memory
        "PYTHONPATH": str(tmp_path),
    }
    # an editable install of this checkout would go before PYTHONPATH, and -P keeps the working directory off the path
    code = (
        "import sys, pytest\n"
        "sys.meta_path = [finder for finder in sys.meta_path if 'Redirecting' not in type(finder).__name__]\n"
        "import sparsemae.runtime.native as native\n"
        f"assert str(native.FILE).startswith({str(tmp_path)!r}), native.FILE\n"
        "sys.exit(pytest.main(sys.argv[1:]))"
    )
    tests = [tmp_path / "tests/native/test_kernels.py", tmp_path / "tests/packing/test_format.py"]
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, "-q", "-p", "no:cacheprovider", *tests],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
