"""`python tools/gpu`: runs the parts; exit status 1 if one has failed."""

import argparse
import sys
from contextlib import redirect_stdout
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # where `gpu` is a package

import timm  # noqa: E402
import torch  # noqa: E402

from gpu import ROOT, __doc__ as about, bench  # noqa: E402
from gpu.parts import PARTS  # noqa: E402


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-results")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=bench.MINUTES)
    given = parser.parse_args()
    with bench.Bench(given.device, given.out, given.minutes) as bench_, redirect_stdout(bench_.log):  # type: ignore[type-var]
        name = torch.cuda.get_device_name() if given.device == "cuda" else "CPU"
        bench_.note("machine", "figure", device=name, torch=torch.__version__, timm=timm.__version__)
        ended = {part: bench_.run(part, PARTS[part]) for part in PARTS if part in given.only}
        counts = {verdict: [part for part in ended if ended[part] == verdict] for verdict in bench.VERDICTS}
        print("; ".join(f"{verdict}: {', '.join(parts)}" for verdict, parts in counts.items() if parts))
    sys.exit(bool(counts["failed"]))


if __name__ == "__main__":
    main()
