"""The whole chain on the embedded images: pretrain, finetune, freeze, evaluate, predict, with the paper's baselines."""

import json
import time
from pathlib import Path

from rich.console import Console

from sparsemae.data.embedded import CLASS_NAMES, EmbeddedReader
from sparsemae.demo import classification, segmentation
from sparsemae.demo.results import markdown, read_arms, table
from sparsemae.demo.stages import empty, run_stages
from sparsemae.files import replacing, write_atomic
from sparsemae.options import DemoConfig
from sparsemae.runtime.model import processors

PREDICTED_IMAGES = 5


def demo(config: DemoConfig) -> None:
    """Run the chain and print what came out."""
    begin = time.monotonic()
    console = Console(highlight=False, soft_wrap=True)
    study = segmentation if config.task == "segment" else classification
    out, minutes = Path(config.out or study.OUT), config.minutes or study.MINUTES
    empty(out)
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
