"""A CycloneDX bill of materials: the packages of requirements.lock, and what the wheel contains of others.

    python tools/sbom.py build/sbom.json

`cyclonedx-py` (cyclonedx-bom) reads the lock. What is compiled into the wheel, or lies in it as data, no installer
knows: it is added here, as NOTICE lists it.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONTAINED = (
    ("library", "LLVM runtimes", "Apache-2.0 WITH LLVM-exception", "https://github.com/llvm/llvm-project"),
    ("library", "wasi-libc", "Apache-2.0 WITH LLVM-exception", "https://github.com/WebAssembly/wasi-libc"),
    ("data", "SceneParse150 class names", "LicenseRef-ADE20k", "https://github.com/CSAILVision/sceneparsing"),
)
"""Kind, name, license and source of what no package stands for."""


def with_contents(document: dict) -> dict:
    """A bill of the lock with what the wheel contains."""
    contained = [
        {
            "type": kind, "name": name, "bom-ref": f"wheel/{name}", "licenses": [{"expression": license_name}],
            "externalReferences": [{"type": "vcs", "url": source}],
        }
        for kind, name, license_name, source in CONTAINED
    ]  # fmt: skip
    return {**document, "components": [*document["components"], *contained]}


def main() -> None:
    """Write the bill to the file named."""
    target = Path(sys.argv[1])
    command = [str(Path(sys.executable).with_name("cyclonedx-py")), "requirements", str(ROOT / "requirements.lock"),
               "--pyproject", str(ROOT / "pyproject.toml"), "--output-format", "JSON", "--validate"]  # fmt: skip
    document = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(with_contents(document), indent=1) + "\n")
    print(f"wrote {target}: {len(document['components']) + len(CONTAINED)} components")


if __name__ == "__main__":
    main()
