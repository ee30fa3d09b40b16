"""Packed models against dense ViTs in the engines people use: latency, throughput, memory and cold start, in one table.

Every engine runs in a process of its own, so that no thread pool disturbs another one's, and the processes take turns:
one timed run each, round after round, with a pause in between in which the spinning threads of the last one go to
sleep. Medians are reported. Models have random weights: speed does not depend on them. An engine that is not installed,
or fails, is named with the reason and left out.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

DENSE = {"B": "vit_base_patch16_224", "S": "vit_small_patch16_224", "T": "vit_tiny_patch16_224"}
ENGINES = (
    "torch fp32",
    "torch bf16",
    "torch compiled bf16",
    "onnxruntime fp32",
    "onnxruntime int8",
    "openvino fp32",
    "openvino bf16",
    "openvino int8",
)
_WARM_SECONDS = 0.2
_PAUSE_SECONDS = 0.3  # longer than the 0.2 s that OpenMP threads spin after their work

Runner = Callable[[NDArray[np.float32]], Any]


@dataclass
class Measurement:
    """One engine with one model."""

    engine: str
    model: str
    milliseconds: dict[int, float] = field(default_factory=dict)
    """Median per call, by batch."""
    cold_start_seconds: float = 0.0
    """From the start of the process, imports included, to the first result."""
    resident_mb: float = 0.0
    """Largest resident size by then, MB = 10^6 bytes."""
    error: str = ""
    """Why there are no figures."""


def measure(
    files: list[str], engines: list[str], dense: list[str], batches: list[int], threads: int, runs: int, artifacts: str
) -> list[Measurement]:
    """Run everything that `BenchmarkConfig` names; a row without figures says why."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = artifacts or temporary
        Path(folder).mkdir(parents=True, exist_ok=True)
        jobs = [("packed", file) for file in files or _random_files(Path(folder))]
        jobs += [(engine, DENSE[size]) for size in dense for engine in engines]
        measurements = []
        workers: list[tuple[Measurement, _Worker]] = []
        for engine, model in jobs:
            label = Path(model).stem if engine == "packed" else model
            print(f"starting {engine}, {label}", file=sys.stderr, flush=True)
            measurement = Measurement(engine, label)
            measurements.append(measurement)
            try:
                _prepare(engine, model, folder)
                workers.append((measurement, _Worker(engine, model, folder, threads)))
                measurement.cold_start_seconds, measurement.resident_mb = workers[-1][1].start()
            except RuntimeError as error:
                measurement.error = str(error)
        try:
            for batch in batches:
                _measure(batch, runs, [(m, worker) for m, worker in workers if not m.error])
        finally:
            for _, worker in workers:
                worker.stop()
    return measurements


def _measure(batch: int, runs: int, workers: list[tuple[Measurement, _Worker]]) -> None:
    """Let all take turns, `runs` times, and note the medians."""
    times: dict[int, list[float]] = {i: [] for i in range(len(workers))}
    for _ in range(runs):
        for i, (measurement, worker) in enumerate(workers):
            if measurement.error:
                continue
            try:
                times[i].append(worker.time(batch))
            except RuntimeError as error:
                measurement.error = str(error)
            time.sleep(_PAUSE_SECONDS)
    for i, (measurement, _) in enumerate(workers):
        if not measurement.error:
            measurement.milliseconds[batch] = 1e3 * median(times[i])


def table(measurements: list[Measurement], batches: list[int]) -> str:
    """The figures as text."""
    head = f"{'engine':<22}{'model':<24}" + "".join(f"{f'b{batch} ms':>10}" for batch in batches)
    lines = [head + f"{'images/s':>10}{'cold s':>8}{'RSS MB':>8}"]
    for m in measurements:
        line = f"{m.engine:<22}{m.model:<24}"
        if m.error:
            lines.append(f"{line}  -- {m.error}")
            continue
        best = max(1e3 * batch / ms for batch, ms in m.milliseconds.items())
        times = "".join(f"{m.milliseconds[batch]:10.2f}" for batch in batches)
        lines.append(f"{line}{times}{best:10.1f}{m.cold_start_seconds:8.2f}{m.resident_mb:8.0f}")
    return "\n".join(lines)


class _Worker:
    """A process that has one engine ready and runs it when it is told a batch size."""

    def __init__(self, engine: str, model: str, folder: str, threads: int) -> None:
        command = [sys.executable, "-m", "sparsemae.benchmark.packed", "run", engine, model, folder, str(threads)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 lives as long as the process
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=environment
        )

    def start(self) -> tuple[float, float]:
        """Wait until it is ready: (seconds to the first result, MB resident)."""
        seconds, resident = self._answer().split()
        return float(seconds), float(resident)

    def time(self, batch: int) -> float:
        """Seconds of one run."""
        _write(self._process.stdin, str(batch))
        return float(self._answer())

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                stream.close()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("= "):
                return line[2:]
        raise RuntimeError(_last_line(self._process, self._errors))


def _write(stream: IO[str] | None, text: str) -> None:
    assert stream is not None
    stream.write(text + "\n")
    stream.flush()


def _last_line(process: subprocess.Popen[str], errors: IO[bytes]) -> str:
    process.wait()
    errors.seek(0)
    lines = errors.read().decode(errors="replace").strip().splitlines()
    missing = [line for line in lines if "ModuleNotFoundError" in line]
    return (missing or lines or ["ended without a word"])[-1].split(": ", 1)[-1][:100]


def _prepare(engine: str, model: str, folder: str) -> None:
    """Export and quantize beforehand, in a process of its own: it is no part of a cold start."""
    if not engine.startswith(("onnxruntime", "openvino")):
        return
    if any(Path(folder).glob(f"{model} {engine}.*")):
        return
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "sparsemae.benchmark.packed", "export", engine, model, folder],
            stdout=subprocess.DEVNULL, stderr=errors, text=True,
        )  # fmt: skip
        if process.wait():
            raise RuntimeError(_last_line(process, errors))


def _random_files(folder: Path) -> list[str]:
    """SparseMAE-T and -S with random weights: packed ViT-B/16 of 1,000 classes."""
    import torch
    from timm import create_model

    from sparsemae.packing.format import LINEARS, Preprocess
    from sparsemae.packing.pack import pack

    files = []
    preprocess = Preprocess((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic", 0.875, False)
    for name, pattern, kept in (("SparseMAE-T", "2:32", 2), ("SparseMAE-S", "4:32", 4)):
        model: Any = create_model(DENSE["B"], global_pool="avg").eval()
        patterns = {f"blocks.{i}.{layer}": pattern for i in range(len(model.blocks)) for layer in LINEARS}
        with torch.no_grad():
            for layer in patterns:
                weight = model.get_submodule(layer).weight
                groups = weight.reshape(-1, 32)
                groups.scatter_(1, torch.rand_like(groups).topk(32 - kept, dim=1).indices, 0.0)
        for dtype in ("bf16", "int8"):
            files.append(str(folder / f"{name} {dtype}.safetensors"))
            pack(model, files[-1], preprocess, dtype, patterns)
    return files


def _export(engine: str, model: str, folder: str) -> None:
    import torch
    from timm import create_model

    path = Path(folder) / f"{model} {engine}"
    example = torch.zeros(2, 3, 224, 224)
    dense = create_model(model).eval()
    if engine.startswith("onnxruntime"):
        batch = torch.export.Dim("batch", min=1, max=1024)
        target = f"{path}.onnx"
        torch.onnx.export(dense, (example,), target, dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
        if engine.endswith("int8"):
            from onnxruntime.quantization import QuantType, quantize_dynamic

            quantize_dynamic(target, target, weight_type=QuantType.QInt8)
        return
    import openvino

    converted = openvino.convert_model(dense, example_input=example, input=[-1, 3, 224, 224])
    if engine.endswith("int8"):
        import nncf

        samples = np.random.default_rng(0).standard_normal((8, 1, 3, 224, 224), np.float32)
        converted = nncf.quantize(
            converted, nncf.Dataset(list(samples)), model_type=nncf.ModelType.TRANSFORMER, subset_size=8
        )
    openvino.save_model(converted, f"{path}.xml")


def _load(engine: str, model: str, folder: str, threads: int) -> Runner:
    path = Path(folder) / f"{model} {engine}"
    if engine == "packed":
        from sparsemae.runtime import load

        return load(model, threads)
    if engine.startswith("torch"):
        return _load_torch(engine, model, threads)
    if engine.startswith("onnxruntime"):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(f"{path}.onnx", options, providers=["CPUExecutionProvider"])
        return lambda images: session.run(None, {session.get_inputs()[0].name: images})
    import openvino

    hints = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    hints["INFERENCE_PRECISION_HINT"] = "f32" if engine.endswith("fp32") else "bf16"
    request = openvino.Core().compile_model(f"{path}.xml", "CPU", hints).create_infer_request()
    return lambda images: request.infer([images])


def _load_torch(engine: str, model: str, threads: int) -> Runner:
    import torch
    from timm import create_model

    torch.set_num_threads(threads)
    dtype = torch.float32 if engine.endswith("fp32") else torch.bfloat16
    dense: Any = create_model(model).eval().to(dtype)
    if "compiled" in engine:
        import torch._inductor.config

        torch._inductor.config.freezing = True
        dense = torch.compile(dense)

    def run(images: NDArray[np.float32]) -> Any:
        with torch.inference_mode("compiled" not in engine), torch.no_grad():
            return dense(torch.from_numpy(images).to(dtype))

    return run


def _serve(engine: str, model: str, folder: str, threads: int) -> None:
    """The worker: one line when the first result is there, then the seconds of a run for every batch size read."""
    run = _load(engine, model, folder, threads)
    images = np.random.default_rng(0).standard_normal((1, 3, 224, 224), np.float32)
    run(images)
    with open("/proc/self/stat") as stat:
        started = int(stat.read().rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
    seconds = time.clock_gettime(time.CLOCK_BOOTTIME) - started
    # not ru_maxrss: after a fork that starts with the size of the parent
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print("=", seconds, int(peak.split()[1]) * 1024 / 1e6, flush=True)
    for line in sys.stdin:
        batch = int(line)
        if len(images) != batch:
            images = np.random.default_rng(0).standard_normal((batch, 3, 224, 224), np.float32)
            run(images)
        warm = time.perf_counter() + _WARM_SECONDS  # wakes the threads and refills the caches after the others' turns
        while True:
            run(images)
            if time.perf_counter() > warm:
                break
        start = time.perf_counter()
        run(images)
        print("=", time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    _, job, engine, model, folder, *rest = sys.argv
    if job == "run":
        _serve(engine, model, folder, int(rest[0]))
    else:
        _export(engine, model, folder)
