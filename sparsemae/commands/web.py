"""A static page that classifies photographs in the visitor's own browser, with a packed file beside it."""

import shutil
from pathlib import Path

from sparsemae.files import replacing
from sparsemae.options import WebConfig
from sparsemae.packing.format import read

PAGE = Path(__file__).parents[1] / "web"
FILES = ("index.html", "page.css", "page.js", "worker.js")
MODULES = ("sparsemae.wasm", "sparsemae-relaxed.wasm")
"""Of `make wasm`; a wheel has them."""


def web(config: WebConfig) -> Path:
    """Write the page's files into a folder; any web server can serve it, and nothing else is asked for."""
    if missing := [name for name in MODULES if not (PAGE / name).is_file()]:
        raise ValueError(f"web: wanted {', '.join(missing)} in {PAGE}, got none: make wasm builds them")
    packed = read(config.model).config
    if not packed.vit.num_classes:
        kind = "an encoder" if packed.head is None else "a segmenter"
        raise ValueError(f"{config.model}: wanted a classifier for a page, got {kind}")
    site = Path(config.site)
    site.mkdir(parents=True, exist_ok=True)
    sources = {name: PAGE / name for name in (*FILES, *MODULES)} | {"model.safetensors": Path(config.model)}
    for name, source in sources.items():
        with replacing(site / name) as temporary:
            shutil.copyfile(source, temporary)
    size = sum((site / name).stat().st_size for name in sources)
    print(f"{site}: {len(sources)} files, {size / 1e6:.1f} MB; for a look: python -m http.server -d {site}")
    return site
