"""`make gpu`: is training right on this GPU, and how fast is it? For a bare checkout on a machine without network.

    python tools/gpu [--device cuda|cpu] [--out DIR] [--only PART ...] [--minutes 8]

It needs torch, timm, Lightning's Fabric, torchmetrics, rich and PyYAML, in whatever versions are there, and calls
functions, not the command line. Parts run in order of worth, each with its own limit, until the time is used up: what
was cut off is "not run", never "passed". Every line goes to DIR/gpu.jsonl as it comes, all that is printed to
DIR/gpu.log. ``--device cpu`` runs all of it tiny, but for what only CUDA has.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
try:
    import lightning_fabric  # noqa: F401
except ImportError:  # the bundle has the same module under another name
    import lightning.fabric as bundled

    sys.modules["lightning_fabric"] = bundled
