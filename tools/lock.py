"""requirements.lock: every package that `sparsemae[train]` and its build need, with the hashes of the files.

    python tools/lock.py > requirements.lock

pip resolves, within constraints.txt, for this machine and each Python below, and says which file it would install; for
another machine it cannot, since it takes the markers of its own. The hashes are those of its index, and of what it
downloaded to look inside. No address of an index is written. Some gigabytes are downloaded.
"""

import json
import platform
import subprocess
import sys
import tempfile
import tomllib
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
HEAD = """\
# Every package that sparsemae[train] and its build need, for Linux on {machine} and Python {pythons}, by tools/lock.py.
#   pip install --require-hashes -r requirements.lock
#   pip install --no-deps --no-build-isolation .
"""


def wanted() -> list[str]:
    """What pyproject.toml asks for, to build and to train."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needs = project["project"]
    return [*project["build-system"]["requires"], *needs["dependencies"], *needs["optional-dependencies"]["train"]]


def files_for(python: str) -> dict[str, tuple[str, str]]:
    """Version and SHA-256 of each package's file."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        subprocess.run(
            [
                sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet",
                "--target", folder, "--python-version", python, "--only-binary", ":all:", "--report", str(report),
                "--constraint", str(ROOT / "constraints.txt"), *wanted(),
            ],
            check=True, stdout=sys.stderr,
        )  # fmt: skip
        found = json.loads(report.read_text())["install"]
    return {
        one["metadata"]["name"].lower().replace("_", "-").replace(".", "-"): (
            one["metadata"]["version"],
            one["download_info"]["archive_info"]["hashes"]["sha256"],
        )
        for one in found
    }


def main() -> None:
    """Print the lock."""
    versions: dict[str, str] = {}
    hashes: dict[str, set[str]] = defaultdict(set)
    pythons: dict[str, set[str]] = defaultdict(set)
    for python in PYTHONS:
        for name, (version, digest) in files_for(python).items():
            if versions.setdefault(name, version) != version:
                raise ValueError(
                    f"{name}: wanted one version, got {versions[name]} and {version}: add it to constraints.txt"
                )
            hashes[name].add(digest)
            pythons[name].add(python)
    print(HEAD.format(machine=platform.machine(), pythons=", ".join(PYTHONS)), end="")
    for name in sorted(versions):
        only = [f'python_version == "{python}"' for python in PYTHONS if python in pythons[name]]
        marker = "" if len(only) == len(PYTHONS) else f" ; {' or '.join(only)}"
        lines = [
            f"{name}=={versions[name]}{marker}",
            *(f"    --hash=sha256:{digest}" for digest in sorted(hashes[name])),
        ]
        print(" \\\n".join(lines))


if __name__ == "__main__":
    main()
