"""Put measured tables (make results, segment, bench, reliability) and tested code into README.md and docs/."""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TASK = re.compile(r"(```python\n)@dataclass\nclass BrightnessConfig.*?(```)", re.DOTALL)
GPU_COLUMNS = ("batch", "share_of_peak", "peak_gib", "planned_gib", "compile_seconds")
DOCS = (ROOT / "README.md", ROOT / "docs/results.md", ROOT / "docs/reliability.md")


def main() -> None:
    """Replace what stands between the marks, for each measurement whose file is there; and the task of extending.md."""
    page = ROOT / "docs/extending.md"
    page.write_text(TASK.sub(lambda match: match[1] + tested_task() + match[2], page.read_text()))
    for target, folder in {"results": "runs/demo", "segment": "runs/demo-segment", "heads": "runs/demo-heads"}.items():
        if measured := read(f"{folder}/results.json"):
            rows = (ROOT / folder / "results.md").read_text()
            put(target, f"{rows}\n`make {target}`: {measured['seconds']:.0f} s on 2 cores.\n")
    if measured := read("docs/benchmark.json"):
        put("bench", benchmark_table(measured))
    if measured := read("docs/benchmark-segmentation.json"):
        put("bench: segmentation", benchmark_table(measured | {"config": measured["config"] | {"batches": [1]}}))
    if measured := read("docs/benchmark-training.json"):
        put("bench: training", training_table(measured))
    if measured := read("docs/benchmark-saving.json"):
        put("bench: saving", saving_table(measured))
    if measured := read("docs/browser.json"):
        put("browser", browser_table(measured))
    if measured := read("docs/bare-install.json"):
        put("bare-install", bare_install_table(measured))
    if (lines := ROOT / "docs/gpu.jsonl").is_file():
        put("gpu", gpu_table([json.loads(line) for line in lines.read_text().splitlines()]))
    if told := read("runs/reliability.json"):
        put("reliability", fault_table(told["fault"]))
        put("reliability: resumed", resume_table(told["resume"]))
    if told := read("runs/soak.json"):
        put("soak", soak_table(told["soak"]))


def tested_task() -> str:
    """The task that tests/tasks/test_new_task.py adds from outside."""
    code = (ROOT / "tests/tasks/test_new_task.py").read_text()
    return code.split("# the task: at most 80 lines, from here\n")[1].split("# to here")[0].strip() + "\n"


def read(path: str) -> Any:
    """A file of figures; None if it was not made."""
    file = ROOT / path
    return json.loads(file.read_text()) if file.is_file() else None


def put(name: str, block: str) -> None:
    """Replace the block of that name wherever it has marks."""
    marks = re.compile(rf"(<!-- table of make {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    for file in DOCS:
        file.write_text(marks.sub(lambda match: f"{match[1]}\n{block}\n{match[2]}", file.read_text()))


def table(head: list[str], rows: list[list[str]], texts: int) -> str:
    """Markdown; the first ``texts`` columns hold words, the others numbers."""
    lines = [head, ["---" if i < texts else "---:" for i in range(len(head))], *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n" for cells in lines)


def browser_table(measured: dict[str, Any]) -> str:
    """Milliseconds of the page and of its rival in one browser, and of the modules in Node."""
    rows = [[name, f"{ms:.0f}"] for name, ms in measured["milliseconds"].items()]
    ours, dense = measured["megabytes"]
    busy = f"under load ({measured['load']:.0f}), " * (measured["load"] > 0.5 * measured["processors"])
    in_node = measured["node_milliseconds"]
    rival = list(in_node.values())[-1]
    node = [[name, f"{ms:.0f}", f"{ms / rival:.2f}"] for name, ms in in_node.items()]
    text = (
        f"\n`make browser`: {measured['browser']}, {busy}medians of 9 runs of one photograph of 224 x 224 px after the "
        f"crop; models of {ours:.0f} and {dense:.0f} MB.\n"
    )
    head = ["in Node, one thread", "ms", "of the rival"]
    return table(["in the browser", "ms"], rows, 1) + "\n" + table(head, node, 1) + text


def bare_install_table(measured: dict[str, Any]) -> str:
    """MB of each package, and what importing takes."""
    sizes, times = measured["megabytes"], measured["import_seconds"]
    rows = [[name, f"{size:.1f}"] for name, size in sorted(sizes.items(), key=lambda one: -one[1])]
    rows.append(["all", f"{sum(sizes.values()):.1f}"])
    ours = times["sparsemae.runtime"]
    busy = "on a busy machine, " * (measured["load"] > 0.5 * measured["processors"])
    return table(["package", "MB"], rows, 1) + (
        f"\n`import sparsemae.runtime`: {1e3 * ours:.0f} ms of processor time beside Python's own start; `import "
        f"numpy` alone {1e3 * times['numpy']:.0f} ms. `make bare-install`: {busy}medians of fresh processes.\n"
    )


def gpu_table(lines: list[dict[str, Any]]) -> str:
    """Speeds of the recipes' steps, then what was held against a reference, as `tools/gpu` wrote them."""
    machine = next(line for line in lines if line["part"] == "machine")
    steps = [line for line in lines if "images_per_second" in line]
    rows = [
        [
            line["part"], f"{line['images_per_second']:,.0f}", *(str(line.get(key, "")) for key in GPU_COLUMNS)
        ]
        for line in steps
    ]  # fmt: skip
    head = [
        "step, bf16, compiled",
        "images/s",
        "batch",
        "fraction of the peak",
        "peak GiB",
        "planned GiB",
        "compiling, s",
    ]
    checks = [
        [
            line["part"], line["verdict"], line.get("largest_relative_difference", ""),
            line.get("of_two_equal_runs", ""),
        ]
        for line in lines
        if line["verdict"] in ("right", "WRONG")
    ]  # fmt: skip
    titles = ["held against a reference", "", "largest relative difference", "of two equal runs"]
    peak = next(line["tera_multiply_adds"] for line in lines if "tera_multiply_adds" in line)
    return (
        f"{machine['device']}, torch {machine['torch']}, timm {machine['timm']}; peak: {peak} T multiply-adds/s, an "
        f"8192 x 8192 x 8192 bf16 product.\n\n{table(head, rows, 1)}\n{table(titles, checks, 2)}"
    )


def benchmark_table(measured: dict) -> str:
    """Milliseconds per call by engine and model, and the first packed model's lead over each at batch 1."""
    batches = [str(batch) for batch in measured["config"]["batches"]]
    rows = [row for row in measured["results"] if not row["error"]]
    ours = rows[0]["milliseconds"]["1"]
    times = [f"batch {batch}, ms" for batch in batches]
    head = ["engine", "model", *times, "cold start, s", "resident, MB", "batch 1, times the first"]
    lines = [
        [
            row["engine"], row["model"], *(f"{row['milliseconds'][batch]:.1f}" for batch in batches),
            f"{row['cold_start_seconds']:.2f}", f"{row['resident_mb']:.0f}", f"{row['milliseconds']['1'] / ours:.2f}",
        ]
        for row in rows
    ]  # fmt: skip
    config = measured["config"]
    said = f"{config['threads']} threads, medians of {config['runs']} interleaved runs"
    return f"{table(head, lines, 2)}\n`make bench`: {said}.\n"


def training_table(measured: dict) -> str:
    """Images per second by part and subject, and how many times the rival's that is."""
    lines = [
        [
            row["part"], row["subject"], f"{row['images_per_second']:.1f}",
            "" if row["ratio"] is None else f"{row['ratio']:.2f}",
        ]
        for row in measured["results"]
    ]  # fmt: skip
    config = measured["config"]
    said = f"{config['threads']} threads, {config['step_batch']} images a step, medians of {config['runs']} turns"
    return f"{table(['part', 'subject', 'images/s', 'times the rival'], lines, 2)}\n`make bench`: {said}.\n"


def saving_table(measured: dict) -> str:
    """Seconds that a checkpoint takes, and that it takes from the loop."""
    head = ["recipe", "files, GB", "blocking save, s", "loop held up, s", "share", "at the first save, s",
            "steps lose while it is written, s", "a step, s"]  # fmt: skip
    lines = []
    for row in measured["results"]:
        names = ("blocking", "held", "first", "slowed", "step")
        blocking, held, *rest = (row[f"{name}_seconds"] for name in names)
        seconds = [f"{value:.2f}" for value in (row["gigabytes"], blocking, held, *rest)]
        lines.append([row["subject"], *seconds[:3], f"{held / blocking:.0%}", *seconds[3:]])
    config = measured["config"]
    said = f"{config['threads']} threads, {config['step_batch']} images a step, medians of {config['runs']} runs"
    return f"{table(head, lines, 1)}\n`make bench`: {said}.\n"


def fault_table(rows: list[dict]) -> str:
    """What was done to runs, and what came of it."""
    head = ["fault", "how it is made", "times", "exit status", "what it says", "weights"]
    weights = {None: "", True: "equal", False: "DIFFER"}
    lines = [
        [row["fault"], row["made"], f"{row['times']:,}", str(row["status"]), row["said"], weights[row["equal"]]]
        for row in rows
    ]
    return table(head, lines, 6)


def resume_table(rows: list[dict]) -> str:
    """Runs that were stopped and continued, each equal to one that was not."""
    head = ["job", "source", "stopped at step", "of", "loader processes", "processes"]
    lines = []
    for row in rows:
        parts = [", ".join(map(str, row[name])) for name in ("stops", "workers", "processes")]
        lines.append([row["job"], row["source"], parts[0], str(row["steps"]), *parts[1:]])
    return table(head, lines, 6)


def soak_table(rows: list[dict]) -> str:
    """What ran for long: how much it held in the end, and how much that grew."""
    head = ["what", "how long", "resident, MB", "slope, MB per hour or 1,000 steps",
            "more in the last fifth than in the second, MB", "at most", "descriptors", "threads"]  # fmt: skip
    lines = []
    for row in rows:
        slope = row["slope"] * (1000 if row["amount"].endswith("steps") else 3600)
        numbers = [f"{row['resident']:.1f}", f"{slope:+.2f}", f"{row['rise']:+.2f}", f"{row['bound']:g}"]
        counts = [f"{row[name]:.0f}" for name in ("descriptors", "threads")]
        lines.append([row["what"], row["amount"], *numbers, *counts])
    return table(head, lines, 2)


if __name__ == "__main__":
    main()
