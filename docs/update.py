"""Put measured tables into README.md and docs/: of `make results`, `segment`, `bench`, `saving` and `reliability`."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCS = (ROOT / "README.md", ROOT / "docs/results.md", ROOT / "docs/reliability.md")


def main() -> None:
    """Replace what stands between the marks, for each measurement whose file is there."""
    demo, bench = ROOT / "runs/demo/results.json", ROOT / "docs/benchmark.json"
    segment, saving = ROOT / "runs/demo-segment/results.json", ROOT / "docs/saving.json"
    if demo.is_file():
        seconds = json.loads(demo.read_text())["seconds"]
        table = (ROOT / "runs/demo/results.md").read_text()
        put("results", f"{table}\n`make results`: {seconds:.0f} s on 2 cores.\n")
    if segment.is_file():
        seconds = json.loads(segment.read_text())["seconds"]
        table = (ROOT / "runs/demo-segment/results.md").read_text()
        put("segment", f"{table}\n`make segment`: {seconds:.0f} s on 2 cores.\n")
    if bench.is_file():
        put("bench", benchmark_table(json.loads(bench.read_text())))
    if saving.is_file():
        put("saving", saving_table(json.loads(saving.read_text())))
    reliability = ROOT / "runs/reliability.json"
    if reliability.is_file():
        told = json.loads(reliability.read_text())
        put("reliability", fault_table(told["fault"]))
        put("reliability: resumed", resume_table(told["resume"]))


def benchmark_table(measured: dict) -> str:
    """Milliseconds per call by engine and model, and the first packed model's lead over each at batch 1."""
    batches = [str(batch) for batch in measured["config"]["batches"]]
    rows = [row for row in measured["results"] if not row["error"]]
    ours = rows[0]["milliseconds"]["1"]
    head = [
        "engine",
        "model",
        *(f"batch {batch}, ms" for batch in batches),
        "cold start, s",
        "resident, MB",
        "batch 1, times the first",
    ]
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    for row in rows:
        times = [f"{row['milliseconds'][batch]:.1f}" for batch in batches]
        rest = [
            f"{row['cold_start_seconds']:.2f}",
            f"{row['resident_mb']:.0f}",
            f"{row['milliseconds']['1'] / ours:.2f}",
        ]
        lines.append([row["engine"], row["model"], *times, *rest])
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    config = measured["config"]
    return f"{table}\n`make bench`: {config['threads']} threads, medians of {config['runs']} interleaved runs.\n"


def saving_table(measured: dict) -> str:
    """Seconds that a checkpoint takes, and that it takes from the loop."""
    head = ["recipe", "files, GB", "blocking save, s", "loop held up, s", "share", "at the first save, s",
            "steps lose while it is written, s", "a step, s"]  # fmt: skip
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in measured["results"]:
        names = ("blocking", "held", "first", "slowed", "step")
        blocking, held, *rest = (row[f"{name}_seconds"] for name in names)
        seconds = [f"{value:.2f}" for value in (row["gigabytes"], blocking, held, *rest)]
        lines.append([row["subject"], *seconds[:3], f"{held / blocking:.0%}", *seconds[3:]])
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    config = measured["config"]
    said = f"{config['threads']} threads, {config['step_batch']} images a step, medians of {config['runs']} runs"
    return f"{table}\n`make saving`: {said}.\n"


def fault_table(rows: list[dict]) -> str:
    """What was done to runs, and what came of it."""
    lines = [["fault", "how it is made", "times", "exit status", "what it says", "weights"], ["---"] * 6]
    for row in rows:
        weights = {None: "", True: "equal", False: "DIFFER"}[row["equal"]]
        cells = [row["fault"], row["made"], f"{row['times']:,}", str(row["status"]), row["said"], weights]
        lines.append([cell.replace("|", "\\|") for cell in cells])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def resume_table(rows: list[dict]) -> str:
    """Runs that were stopped and continued, each equal to one that was not."""
    lines = [["job", "source", "stopped at step", "of", "loader processes", "processes"], ["---"] * 6]
    for row in rows:
        parts = [", ".join(map(str, row[name])) for name in ("stops", "workers", "processes")]
        lines.append([row["job"], row["source"], parts[0], str(row["steps"]), *parts[1:]])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def put(name: str, block: str) -> None:
    """Replace the block of that name wherever it has marks."""
    marks = re.compile(rf"(<!-- table of make {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    for file in DOCS:
        file.write_text(marks.sub(lambda match: f"{match[1]}\n{block}\n{match[2]}", file.read_text()))


if __name__ == "__main__":
    main()
