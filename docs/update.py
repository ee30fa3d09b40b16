"""Put the demo's table into README.md and docs/results.md; `make results` calls it."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TABLE = re.compile(r"(<!-- table of make results -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    """Replace what stands between the two marks."""
    table = (ROOT / "runs/demo/results.md").read_text()
    seconds = json.loads((ROOT / "runs/demo/results.json").read_text())["seconds"]
    block = f"\n{table}\n`make results`: {seconds:.0f} s on 2 cores.\n\n"
    for file in (ROOT / "README.md", ROOT / "docs/results.md"):
        file.write_text(TABLE.sub(lambda match: match[1] + block + match[2], file.read_text()))


if __name__ == "__main__":
    main()
