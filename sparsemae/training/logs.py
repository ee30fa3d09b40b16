"""What a run tells: its folder's files for machines, and progress for people.

On a terminal a rich progress bar with rate and time left; elsewhere a plain line every ten seconds. Only the first
process writes.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import chain, islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import sparsemae
from sparsemae.files import existing, write_atomic
from sparsemae.terminal import printable
from sparsemae.training.mirrors import Mirror, mirrored, open_mirrors

METRICS = "metrics.jsonl"
PLAIN_LINE_SECONDS = 10.0
_PACKAGES = ("sparsemae", "torch", "torchvision", "timm", "lightning-fabric", "torchmetrics", "numpy", "pillow")


class RunLog:
    """Writes the ``.jsonl`` files of a run's folder, and prints progress.

    Args:
        folder: the run's folder; None: print only.
        active: False on all processes but the first: nothing is written or printed.
    """

    def __init__(self, folder: Path | None, active: bool = True) -> None:
        self.folder, self.active = folder if active else None, active
        self.console = Console(stderr=True, quiet=not active, highlight=False, emoji=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._unwritten: dict[str, str] = {}
        self._mirrors: list[Mirror] = []
        self.lost: Callable[[], str] = str
        """Says what became of the folder, if it is gone: nothing is written then."""

    def info(self, *lines: str) -> None:
        """Print lines, above the progress bar where there is one."""
        text = "\n".join(map(printable, lines))
        (self._bar.console if self._bar else self.console).print(text, markup=False)

    def write(self, file: str, record: Mapping[str, Any]) -> None:
        """Append one JSON line to a file of the run's folder; on a full disk it waits for the next one."""
        if self.folder is None or self.lost():
            return
        lines = self._unwritten.pop(file, "") + json.dumps(record) + "\n"
        path = self.folder / file
        size = path.stat().st_size if path.is_file() else 0
        try:
            with existing(path).open("a") as stream:
                stream.write(lines)
        except OSError as error:
            if path.is_file():
                os.truncate(path, size)  # what was written of it
            self._unwritten[file] = lines
            self.info(f"warning: {path}: could not be written: {error.strerror}; the line is kept")
        for mirror in list(self._mirrors) if file == METRICS else ():
            try:
                mirrored(mirror, record)
                mirror.save()
            except OSError as error:
                self._mirrors.remove(mirror)
                self.info(f"warning: --log: {error}: nothing more is written to {type(mirror).__name__}")

    def mirror(self, names: Sequence[str], config: Mapping[str, Any]) -> None:
        """Write the metrics to others, too, those of before included. Raises ValueError as `open_mirrors`."""
        if self.folder is not None and names:
            file = self.folder / METRICS
            before = file.read_text().splitlines() if file.is_file() else []
            self._mirrors = open_mirrors(names, self.folder, config, list(map(json.loads, before)))

    def close(self, kind: type[BaseException] | None, *error: object) -> None:
        """The run has ended, by an error of that kind or well."""
        for mirror in self._mirrors:
            with suppress(OSError):
                mirror.finalize("failed" if kind else "success")
        self._mirrors = []

    def truncate_after(self, step: int) -> None:
        """Drop the lines of steps beyond the checkpoint that a run continues from, so that no step is listed twice."""
        if self.folder is None:
            return
        for name in (METRICS, "topology.jsonl", "bad-batches.jsonl"):
            file = self.folder / name
            if file.is_file():
                lines = file.read_text().splitlines()
                write_atomic(file, "".join(f"{line}\n" for line in lines if _step_of(line) <= step))

    @contextmanager
    def progress(
        self, title: str, start: int, total: int, images_per_step: int, unit: str = "step"
    ) -> Iterator["StepProgress"]:
        """A progress display over optimizer steps, or other units; `StepProgress.advance` moves it."""
        if self.active and self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                TextColumn("{task.fields[status]}"),
            )  # fmt: skip
            with Progress(*columns, console=self.console) as bar:
                self._bar = bar
                task = bar.add_task(title, total=total, completed=start, status="")
                try:
                    yield StepProgress(self, title, start, total, images_per_step, task, unit)
                finally:
                    self._bar = None
        else:
            yield StepProgress(self, title, start, total, images_per_step, None, unit)


class StepProgress:
    """One running display: measures the rate and shows it."""

    def __init__(
        self, log: RunLog, title: str, start: int, total: int, images_per_step: int, task: Any, unit: str
    ) -> None:
        self._log, self._title, self._start, self._total = log, title, start, total
        self._images_per_step, self._task, self._unit = images_per_step, task, unit
        self._begin = self._last_line = time.monotonic()

    def images_per_second(self, step: int) -> float:
        """Mean rate since the start of this display, over all devices."""
        return (step - self._start) * self._images_per_step / max(time.monotonic() - self._begin, 1e-9)

    def advance(self, step: int, status: str) -> None:
        """Show that ``step`` optimizer steps are done."""
        if not self._log.active:
            return
        now, rate = time.monotonic(), self.images_per_second(step)
        if self._task is not None and self._log._bar is not None:
            self._log._bar.update(self._task, completed=step, status=f"{rate:,.0f} images/s  {status}")
        elif now - self._last_line >= PLAIN_LINE_SECONDS:
            self._last_line = now
            left = (self._total - step) * self._images_per_step / max(rate, 1e-9)
            self._log.info(
                f"{self._title}: {self._unit} {step}/{self._total}, {rate:,.0f} images/s, {left:,.0f} s left, {status}"
            )


def with_progress(batches: Iterable[Any], title: str, images: int) -> Iterator[Any]:
    """Batches as they come, under a progress display over their images."""
    rest, seen = iter(batches), 0
    first = list(islice(rest, 1))  # starts a loader's processes, before the progress display starts its thread
    with RunLog(None).progress(title, 0, images, 1, unit="image") as progress:
        for batch in chain(first, rest):
            yield batch
            seen += len(batch["image"])
            progress.advance(seen, "")


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # a line torn by a kill
        return sys.maxsize


def package_versions() -> dict[str, str]:
    """Of the packages that the numbers depend on, where they are installed."""
    versions = {}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def environment() -> dict[str, Any]:
    """Versions and machine, for ``environment.json``."""
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(), "platform": platform.platform(), "packages": package_versions(),
        "torch": torch.__version__, "cuda_devices": devices, "torch_threads": torch.get_num_threads(),
        "processor": _processor(), "commit": commit(), "command": sys.argv,
    }  # fmt: skip


def _processor() -> str | None:
    """None in a checkout without the native library, as on a machine that only trains on a GPU."""
    try:
        from sparsemae.runtime import native
    except ImportError:
        return None
    return native.processor_name()


def commit() -> str:
    """Of the checkout that this package lies in; of an installed package its version, whatever checkout that is in."""
    root = Path(sparsemae.__file__).parent.parent
    if not (root / ".git").exists():
        return sparsemae.__version__
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return sparsemae.__version__
    return done.stdout.strip() or sparsemae.__version__
