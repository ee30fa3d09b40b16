"""The whole chain on the embedded images: pretrain, finetune, freeze, evaluate, predict, with the paper's baselines."""

import json
import shutil
import time
from pathlib import Path

from rich.console import Console

from sparsemae.data.embedded import CLASS_NAMES, EmbeddedReader
from sparsemae.demo import classification, heads, segmentation
from sparsemae.demo.results import markdown, read_arms, table
from sparsemae.files import replacing, write_atomic
from sparsemae.options import DemoConfig
from sparsemae.processors import processors
from sparsemae.study.stages import run_stages

MARKER = ".sparsemae-demo"
PREDICTED_IMAGES = 5


def demo(config: DemoConfig) -> None:
    """Run the chain and print what came out."""
    begin = time.monotonic()
    console = Console(highlight=False, soft_wrap=True)
    study = {"classify": classification, "segment": segmentation, "heads": heads}[config.task]
    out, minutes = Path(config.out or study.OUT), config.minutes or study.MINUTES
    _empty(out)
    images = _write_test_images(out / "images")
    console.print(study.INTRODUCTION)
    done = run_stages(study.STAGES, out, config.seed, begin + 60 * minutes - study.ENDING_SECONDS, console)
    arms = read_arms([stage for stage in study.STAGES if stage.name in done], out)
    rows = study.rows(arms)
    console.print(table(study.TITLE, study.HEADINGS, rows))
    if left_out := "; ".join(stage.title for stage in study.STAGES if stage.name not in done):
        console.print(f"Left out, for lack of time (--minutes {minutes:g}): {left_out}")
    besides = study.finish(arms, out, images, config.seed, console)
    seconds = time.monotonic() - begin
    console.print(f"{seconds:.0f} s on {processors()} cores")
    write_atomic(out / "results.json", json.dumps({"seconds": seconds, "arms": arms}, indent=1))
    write_atomic(out / "results.md", markdown(study.HEADINGS, rows) + besides)


def _write_test_images(folder: Path) -> Path:
    folder.mkdir()
    reader = EmbeddedReader("val")
    for index in range(PREDICTED_IMAGES):
        image, label = reader[index]
        name = f"{index}-{CLASS_NAMES[label].replace('/', '-').replace(' ', '-').lower()}.png"
        with replacing(folder / name) as temporary:
            image.save(temporary, "PNG")
    return folder


def _empty(out: Path) -> None:
    """Make the demo's folder, or empty an earlier demo's. Raises ValueError rather than remove other files."""
    if out.exists() and any(out.iterdir()) and not (out / MARKER).is_file():
        raise ValueError(f"--out: {out}: wanted a new folder or that of an earlier demo, got one with other files")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / MARKER).touch()
