"""Packed models against dense ViTs in the engines people use: latency, throughput, memory and cold start, in one table.

Every engine runs in a process of its own, so that no thread pool disturbs another one's, and the processes take turns:
one timed run each, round after round, with a pause in between in which the spinning threads of the last one go to
sleep. Medians are reported. Models have random weights: speed does not depend on them. An engine that is not installed,
or fails, is named with the reason and left out.
"""

import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from subprocess import PIPE, STDOUT, Popen
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsemae.benchmark.timing import aligned, seconds

DENSE = {"B": "vit_base_patch16_224", "S": "vit_small_patch16_224", "T": "vit_tiny_patch16_224"}
_WARM_SECONDS = 0.2
_PAUSE_SECONDS = 0.3  # longer than the 0.2 s that OpenMP threads spin after their work

Runner = Callable[[NDArray[Any]], Any]


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
        folder = Path(artifacts or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        subjects = [("packed", file) for file in files or _random_files(folder)]
        subjects += [(engine, DENSE[size]) for size in dense for engine in engines]
        return compare(subjects, "sparsemae.benchmark.packed", folder, batches, threads, runs)


def compare(
    subjects: list[tuple[str, str]], module: str, folder: Path, batches: list[int], threads: int, runs: int
) -> list[Measurement]:
    """Times of engines with models, in turns; ``module``, run as a program, exports and serves one."""
    with ExitStack() as stack:
        workers = [_Worker(stack, module, engine, model, folder, threads) for engine, model in subjects]
        with suppress(KeyboardInterrupt):  # what there is until then is the result
            for batch in batches:
                times = defaultdict[_Worker, list[float]](list)
                for run, worker in product(range(runs), workers):
                    if not worker.row.error:
                        times[worker] += worker.ask(f"{batch}\n")
                        time.sleep(_PAUSE_SECONDS)
                        said = f"batch {batch}, run {run + 1} of {runs}: {worker.row.engine}, {worker.row.model}"
                        print(f"{said}: {1e3 * times[worker][-1]:.2f} ms" * bool(times[worker]), file=sys.stderr)
                for worker, taken in times.items():
                    if not worker.row.error:
                        worker.row.milliseconds[batch] = 1e3 * median(taken)
        return [worker.row for worker in workers if worker.row.error or worker.row.milliseconds]


def table(measurements: list[Measurement]) -> str:
    """The figures as text, and below them what has none."""
    batches = dict.fromkeys(batch for m in measurements for batch in m.milliseconds)
    rows = [["engine", "model", *(f"b{batch} ms" for batch in batches), "images/s", "cold s", "RSS MB"]]
    for m in measurements:
        if not m.error:
            best = max(1e3 * batch / ms for batch, ms in m.milliseconds.items())
            times = (f"{m.milliseconds[batch]:.2f}" for batch in batches)
            rows.append(
                [m.engine, m.model, *times, f"{best:.1f}", f"{m.cold_start_seconds:.2f}", f"{m.resident_mb:.0f}"]
            )
    return "\n".join([aligned(rows, 2), *(f"{m.engine}, {m.model} -- {m.error}" for m in measurements if m.error)])


class _Worker:
    """A process that has one engine ready and runs it when it is told a batch size; ``row`` says if it ended."""

    def __init__(
        self, stack: ExitStack, module: str, engine: str, model: str, folder: Path, threads: int
    ) -> None:  # fmt: skip
        self.row = Measurement(engine, Path(model).stem if engine == "packed" else model)
        print(f"starting {engine}, {self.row.model}", file=sys.stderr, flush=True)
        exported = engine.startswith(("packed", "torch")) or any(folder.glob(f"{model} {engine}.*"))
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        answer: list[float] = []
        # exported and quantized beforehand, by a process of its own: that is no part of a cold start
        for job in ("run",) if exported else ("export", "run"):
            if not self.row.error:
                argv = [
                    sys.executable,
                    "-m",
                    module,
                    job,
                    engine,
                    model,
                    str(folder),
                    str(threads),
                ]
                self.process = stack.enter_context(
                    Popen(argv, stdin=PIPE, stdout=PIPE, stderr=STDOUT, text=True, errors="replace", env=environment)
                )
                stack.callback(self.process.kill)
                answer = self.ask()
        if answer:
            self.row.cold_start_seconds, self.row.resident_mb = answer

    def ask(self, question: str = "") -> list[float]:
        """The numbers of its next answer, to a line if one is sent; none if it ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(question, file=self.process.stdin, end="", flush=True)
        said = ["ended without a word"]
        for line in self.process.stdout:
            if line.startswith("= "):
                return [float(number) for number in line.split()[1:]]
            said += [line.strip()] if line.strip() else []
        telling = [line for line in said if "ModuleNotFoundError" in line] or said
        self.row.error = telling[-1].split(": ", 1)[-1][:100]
        return []


def _random_files(folder: Path) -> list[str]:
    """SparseMAE-T and -S with random weights: packed ViT-B/16 of 1,000 classes."""
    from timm import create_model

    from sparsemae.packing.pack import pack
    from sparsemae.sparsity import freeze, sparsify

    files = []
    for name, pattern in (("SparseMAE-T", "2:32"), ("SparseMAE-S", "4:32")):
        model = create_model(DENSE["B"], global_pool="avg").eval()
        sparsify(model, pattern)
        freeze(model)
        for dtype in ("bf16", "int8"):
            files.append(str(folder / f"{name} {dtype}.safetensors"))
            pack(model, files[-1], dtype=dtype)
    return files


def _export(engine: str, model: str, folder: str, threads: int) -> None:
    """The other worker: the file that an engine runs, int8 where it says so."""
    import torch
    from timm import create_model

    torch.set_num_threads(threads)
    target, quantized = f"{folder}/{model} {engine}", engine.endswith("int8")
    example, dense = torch.zeros(2, 3, 224, 224), create_model(model).eval()
    if engine.startswith("onnxruntime"):
        shapes = ({0: torch.export.Dim("batch", min=1, max=1024)},)
        torch.onnx.export(dense, (example,), f"{target}.onnx", dynamo=True, dynamic_shapes=shapes, verbose=False)
        if quantized:
            from onnxruntime.quantization import QuantType, quantize_dynamic

            quantize_dynamic(f"{target}.onnx", f"{target}.onnx", weight_type=QuantType.QInt8)
    else:
        import openvino

        converted = openvino.convert_model(dense, example_input=example, input=[-1, 3, 224, 224])
        if quantized:
            import nncf

            samples = nncf.Dataset(list(np.random.default_rng(0).standard_normal((8, 1, 3, 224, 224), np.float32)))
            converted = nncf.quantize(converted, samples, model_type=nncf.ModelType.TRANSFORMER, subset_size=8)
        openvino.save_model(converted, f"{target}.xml")
    print("= 0", flush=True)


def _load(engine: str, model: str, folder: str, threads: int) -> Runner:
    file = f"{folder}/{model} {engine}"
    if engine == "packed":
        from sparsemae.runtime import load

        return load(model, threads)
    if engine.startswith("torch"):
        return _load_torch(engine, model, threads)
    if engine.startswith("onnxruntime"):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(f"{file}.onnx", options, providers=["CPUExecutionProvider"])
        return lambda images: session.run(None, {session.get_inputs()[0].name: images})
    return load_openvino(file, engine, threads)


def load_openvino(file: str, engine: str, threads: int) -> Runner:
    """What runs ``FILE.xml`` in the precision that the engine's name says."""
    import openvino

    hints = {
        "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32" if engine.endswith("fp32") else "bf16",
    }  # fmt: skip
    request = openvino.Core().compile_model(f"{file}.xml", "CPU", hints).create_infer_request()
    return lambda images: request.infer([images])


def _load_torch(engine: str, model: str, threads: int) -> Runner:
    import torch
    from timm import create_model

    torch.set_num_threads(threads)
    dtype = torch.float32 if engine.endswith("fp32") else torch.bfloat16
    dense: Any = create_model(model).eval().to(dtype)
    if "compiled" not in engine:
        return torch.inference_mode()(lambda images: dense(torch.from_numpy(images).to(dtype)))
    import torch._inductor.config

    torch._inductor.config.freezing = True
    dense = torch.compile(dense)
    return torch.no_grad()(lambda images: dense(torch.from_numpy(images).to(dtype)))


def serve(run: Runner, example: Callable[[int], NDArray[Any]]) -> None:
    """The worker: one line when the first result is there, then the seconds of a run for every batch size read."""
    run(example(1))
    with open("/proc/self/stat") as stat:
        started = int(stat.read().rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
    cold_start = time.clock_gettime(time.CLOCK_BOOTTIME) - started
    # not ru_maxrss: after a fork that starts with the size of the parent
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print("=", cold_start, int(peak.split()[1]) * 1024 / 1e6, flush=True)
    for line in sys.stdin:
        images = example(int(line))
        warm = time.perf_counter() + _WARM_SECONDS  # wakes the threads and refills the caches after the others' turns
        while time.perf_counter() < warm:
            run(images)
        print("=", seconds(partial(run, images)), flush=True)


def _serve(engine: str, model: str, folder: str, threads: int) -> None:
    def example(batch: int) -> NDArray[np.float32]:
        return np.random.default_rng(0).standard_normal((batch, 3, 224, 224), np.float32)

    serve(_load(engine, model, folder, threads), example)


if __name__ == "__main__":
    _, job, engine, model, folder, threads = sys.argv
    {"run": _serve, "export": _export}[job](engine, model, folder, int(threads))
