"""`make gpu`: is training right on this GPU, and how fast is it? One script for a bare checkout without network.

    python tools/gpu.py [--device cuda|cpu] [--out DIR] [--only PART] [--minutes 8]

It needs torch, timm, Lightning's Fabric, torchmetrics, rich and PyYAML, in whatever versions are there, and calls
functions, not the command line. Parts run in order of worth until the time is used up: what was cut off is "not run",
never "passed". Every line goes to DIR/gpu.jsonl as it comes; ``--device cpu`` runs all of it tiny.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, get_type_hints

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
try:
    import lightning_fabric  # noqa: F401
except ImportError:  # the bundle has the same module under another name
    import lightning.fabric as bundled

    sys.modules["lightning_fabric"] = bundled

import timm  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from lightning_fabric import Fabric  # noqa: E402
from PIL import Image  # noqa: E402
from torch import nn  # noqa: E402

from sparsemae.commands.train import train  # noqa: E402
from sparsemae.costs.step_memory import step_memory  # noqa: E402
from sparsemae.data.embedded import CLASS_NAMES, EmbeddedReader, masks  # noqa: E402
from sparsemae.data.sampling import BatchPlan, seed_all  # noqa: E402
from sparsemae.models.weights import read_weights  # noqa: E402
from sparsemae.options.tasks import FinetuneConfig, PretrainConfig, SegmentConfig, TrainingConfig  # noqa: E402
from sparsemae.sparsity import MaskSchedule, NMPattern, freeze, iter_sparse, nm_mask, sparsify  # noqa: E402
from sparsemae.tasks import task_class  # noqa: E402
from sparsemae.tasks.sparse import make_sparse, meta_model  # noqa: E402
from sparsemae.training.checkpoint import list_checkpoints  # noqa: E402
from sparsemae.training.optim import make_optimizer  # noqa: E402
from sparsemae.training.step import optimizer_step  # noqa: E402

KINDS: dict[str, type[TrainingConfig]] = {
    "pretrain": PretrainConfig, "finetune": FinetuneConfig, "segment": SegmentConfig
}  # fmt: skip
RECIPES = ("pretrain_t", "finetune_t", "segment_t", "finetune_s", "segment_s", "pretrain_s")
BATCHES = {"pretrain": 256, "finetune": 128, "segment": 16}
"""Images per forward of the timed steps."""


class Bench:
    """The parts' results, written down as they come."""

    def __init__(self, device: str, out: Path, minutes: float) -> None:
        self.device, self.out, self.tiny = device, out, device == "cpu"
        self.until = time.monotonic() + 60 * minutes
        out.mkdir(parents=True, exist_ok=True)
        write_images(out / "images")
        self.file = (out / "gpu.jsonl").open("w")

    def note(self, part: str, verdict: str, **figures: Any) -> None:
        """One line: 'right', 'WRONG', 'figure' or 'not run'."""
        line = {"part": part, "verdict": verdict, **figures}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        print(f"{part:<34} {verdict:<8} " + ", ".join(f"{k} {v}" for k, v in figures.items()), flush=True)

    def check(self, part: str, right: bool, **figures: Any) -> None:
        """A part that is right or not."""
        self.note(part, "right" if right else "WRONG", **figures)

    def run(self, part: str, work: Callable[[Bench], None]) -> None:
        """Run a part, unless the time is used up; its own error is a wrong result, not the end."""
        if time.monotonic() > self.until:
            self.note(part, "not run", reason="no time left")
            return
        begin = time.monotonic()
        try:
            work(self)
        except Exception as error:
            traceback.print_exc()
            self.note(part, "WRONG", error=f"{type(error).__name__}: {error}"[:300])
        self.note(f"{part}: seconds", "figure", seconds=round(time.monotonic() - begin, 1))


def options(kind: type[Any], tree: dict[str, Any]) -> Any:
    """A dataclass of options from nested settings, as the command line makes it."""
    hints, values = get_type_hints(kind), {}
    base = kind()
    for member in fields(kind):
        if member.name not in tree:
            continue
        value, default = tree[member.name], getattr(base, member.name)
        if is_dataclass(default):
            value = options_over(default, value)
        elif isinstance(value, list) and "tuple" in str(hints[member.name]):
            value = tuple(value)
        values[member.name] = value
    return replace(base, **values)


def options_over(default: Any, tree: dict[str, Any]) -> Any:
    """The same on top of given defaults."""
    hints = get_type_hints(type(default))
    values = {
        name: tuple(value) if isinstance(value, list) and "tuple" in str(hints[name]) else value
        for name, value in tree.items()
    }
    return replace(default, **values)


def recipe(name: str, **changes: Any) -> Any:
    """A recipe's options, with some groups' settings changed."""
    tree = yaml.safe_load((ROOT / f"sparsemae/recipes/{name}.yaml").read_text())
    job = name.removeprefix("demo_").split("_")[0]
    for group, settings in changes.items():
        tree[group] = {**tree.get(group, {}), **settings} if isinstance(settings, dict) else settings
    return options(KINDS[job], tree)


TINY = {"name": "vit_base_patch16_224", "args": {"patch_size": 7, "embed_dim": 64, "depth": 4, "num_heads": 2}}


def write_images(root: Path) -> None:
    """The first embedded images as files, with classes and with masks: an evaluation of all 10,000 would take long."""
    for split, count in (("train", 128), ("val", 32)):
        reader, classes = EmbeddedReader(split), masks(split)
        for index in range(count):
            image, label = reader[index]
            where = {
                root / f"classes/{split}/{label}/{index}.png": image, root / f"masks/images/{split}/{index}.png": image,
                root / f"masks/masks/{split}/{index}.png": Image.fromarray(classes[index]),
            }  # fmt: skip
            for file, picture in where.items():
                file.parent.mkdir(parents=True, exist_ok=True)
                picture.save(file)
    (root / "masks/classes.txt").write_text("\n".join(["Background", *CLASS_NAMES]))


def small(bench: Bench, job: str, out: str, **trainer: Any) -> Any:
    """A demo job of a few steps on these images, in fp32."""
    root = bench.out / "images"
    where = {"root": str(root / "classes")}
    if job == "segment":
        where = {"root": str(root / "masks"), "classes": str(root / "masks/classes.txt")}
    settings = {
        "accelerator": bench.device, "precision": "fp32", "global_batch": 32, "epochs": 2, "save_every_steps": 3,
        "log_every_steps": 1, "evaluate_every_epochs": 100, "compile": False, "steps": None, **trainer,
    }  # fmt: skip
    return recipe(
        f"demo_{job}", out=out, init=None, model={**TINY, "drop_path": 0.1}, trainer=settings,
        data={"source": "folder", **where, "train_images": None, "workers": 0},
        # epsilon 1: AdamW's first steps would else be signs of gradients, of rounding noise where these are nearly 0
        optim={"warmup_epochs": 0.5, "warmup_steps": None, "eps": 1.0, "lr": 1.0, "min_lr": 0.0, "weight_decay": 0.0},
    )  # fmt: skip


def weights(run: str) -> dict[str, torch.Tensor]:
    """What a run wrote."""
    return read_weights(run)[0]


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest relative difference of two models' weights, in the norm, over their tensors."""
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k].double()).norm() / a[k].double().norm().clamp_min(1e-12)) for k in a)


def masks_are_equal(bench: Bench) -> None:
    """Masks on the device against those on the CPU, ties, signed zeros and denormals included."""
    generator, right = torch.Generator().manual_seed(0), True
    for pattern in ("2:32", "4:32", "1:4", "2:4", "8:32"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            weight = torch.randn(64, 768, generator=generator).mul(4).round().div(4)  # many ties
            weight[0], weight[1], weight[2, ::2] = 0.0, -0.0, 1e-40
            weight = weight.to(dtype)
            kept = nm_mask(weight, NMPattern.parse(pattern))
            right &= torch.equal(nm_mask(weight.to(bench.device), NMPattern.parse(pattern)).cpu(), kept)
    bench.check("masks equal the CPU's", right)


def jobs_agree_with_cpu(bench: Bench) -> None:
    """A few steps of each job, on the CPU and on the device."""
    for job in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            for name, device in (("cpu", "cpu"), ("device", bench.device), ("again", bench.device)):
                config = small(bench, job, f"{folder}/{name}", accelerator=device, max_steps=3)
                config.model = replace(config.model, drop_path=0.0)  # drawn, like erasing, on the device
                if isinstance(config, FinetuneConfig):
                    config.erasing = 0.0
                train(config)
            found = difference(weights(f"{folder}/cpu"), weights(f"{folder}/device"))
            noise = difference(weights(f"{folder}/again"), weights(f"{folder}/device"))
        figures = {"largest_relative_difference": f"{found:.1e}", "of_two_equal_runs": f"{noise:.1e}"}
        bench.check(f"{job}: 3 steps as on the CPU", found < 2e-2 + noise, **figures)


def jobs_resume(bench: Bench) -> None:
    """A run stopped in mid-epoch and continued, against one that was not; where two of these differ, by no more.

    The backward of bilinear upsampling adds in any order on a GPU, so that no segmentation is repeated bit for bit.
    """
    for job in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            for name in ("whole", "again"):
                train(small(bench, job, f"{folder}/{name}"))
            train(small(bench, job, f"{folder}/cut", max_steps=3))
            assert list_checkpoints(Path(f"{folder}/cut/checkpoints"))
            train(small(bench, job, f"{folder}/cut"))
            found = difference(weights(f"{folder}/whole"), weights(f"{folder}/cut"))
            noise = difference(weights(f"{folder}/whole"), weights(f"{folder}/again"))
        figures = {"largest_relative_difference": f"{found:.1e}", "of_two_equal_runs": f"{noise:.1e}"}
        bench.check(f"{job}: resumed in mid-epoch", found <= 10 * noise, **figures)


def schedules_run(bench: Bench) -> None:
    """Fixed mask, gradual N:M, late freeze, moving average, accumulation: each ends frozen and N:M."""
    ways: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "fixed": ({"mask": "fixed"}, {}), "gradual": ({"schedule": "gradual"}, {}),
        "freeze_epoch": ({"freeze_epoch": 1.0}, {}), "decoupled": ({"term": "decoupled", "strength": 0.5}, {}),
        "ema": ({}, {"ema_decay": 0.9}), "accumulation": ({}, {"device_batch": 8}),
        "bf16": ({}, {"precision": "bf16"}), "compiled": ({}, {"compile": True}),
    }  # fmt: skip
    for name, (sparse, trainer) in ways.items():
        if name == "compiled" and bench.tiny:
            continue
        with tempfile.TemporaryDirectory() as folder:
            config = small(bench, "finetune", f"{folder}/run", **trainer)
            config.sparse = replace(config.sparse, **sparse)
            train(config)
            state = weights(f"{folder}/run")
        kept = {k: v for k, v in state.items() if k.endswith("weight_mask")}
        groups = [mask.reshape(-1, 32).sum(dim=1) for mask in kept.values()]
        zeros = all((state[k.removesuffix("_mask")][~mask] == 0).all() for k, mask in kept.items())
        bench.check(f"finetune, {name}", bool(groups) and zeros and all((g == 2).all() for g in groups))


def compiled_agrees(bench: Bench) -> None:
    """The compiled training forward against the eager one, fp32, without drop path."""
    if bench.tiny:
        bench.note("compile as eager", "not run", reason="the CPU's compiler is not what is asked about")
        return
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for compiled in (False, True):
            config = small(bench, "finetune", f"{folder}/{compiled}", compile=compiled, max_steps=3)
            config.model = replace(config.model, drop_path=0.0)
            train(config)
            found[compiled] = weights(f"{folder}/{compiled}")
    largest = difference(found[False], found[True])
    bench.check("compile as eager", largest < 1e-2, largest_relative_difference=f"{largest:.1e}")


def frozen_masks_follow(bench: Bench) -> None:
    """A frozen layer that is moved to the device stays frozen through optimizer steps."""
    model = sparse_linear()
    freeze(model)
    model.to(bench.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        model(torch.randn(4, 64, device=bench.device)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    (_, layer), *_ = iter_sparse(model)
    bench.check("frozen weights stay 0", bool((layer.weight[~layer.weight_mask] == 0).all()))


def sparse_linear() -> nn.Module:
    """One 2:32 layer."""
    model = nn.Sequential(nn.Linear(64, 64))
    sparsify(model, "2:32", include=["0"])
    return model


def out_of_memory(bench: Bench) -> None:
    """More images than the device holds: one line that names the setting, not a traceback."""
    if bench.tiny:
        bench.note("out of memory", "not run", reason="a CPU swaps")
        return
    held = torch.empty(int(0.995 * torch.cuda.mem_get_info()[0]), dtype=torch.uint8, device=bench.device)
    said = ""
    with tempfile.TemporaryDirectory() as folder:
        config = small(bench, "finetune", f"{folder}/run")
        config.trainer = replace(config.trainer, global_batch=128)
        config.model = replace(config.model, args={**config.model.args, "embed_dim": 768, "num_heads": 12})
        try:
            train(config)
        except ValueError as error:
            said = str(error)
    del held
    torch.cuda.empty_cache()
    bench.check("out of memory", "out of memory" in said and "device_batch" in said, said=said[:160])


def peak_flops(bench: Bench) -> float:
    """bf16 multiply-adds per second of a large matrix product: what the device reaches at best."""
    side = 512 if bench.tiny else 8192
    a, b = (torch.randn(side, side, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    seconds = timed(bench, lambda: a @ b, 3 if bench.tiny else 20)
    return side**3 / seconds


def timed(bench: Bench, work: Callable[[], object], runs: int) -> float:
    """Median seconds of a call, the device awaited."""
    times = []
    for _ in range(runs + 2):
        synchronize(bench)
        begin = time.perf_counter()
        work()
        synchronize(bench)
        times.append(time.perf_counter() - begin)
    return median(times[2:])


def synchronize(bench: Bench) -> None:
    """Wait for the device."""
    if bench.device == "cuda":
        torch.cuda.synchronize()


def steps(bench: Bench, recipes: Sequence[str] = RECIPES) -> None:
    """Each recipe's optimizer step at ViT-B in bf16, compiled, sparse and dense, against timm's dense ViT-B."""
    peak = peak_flops(bench)
    bench.note("peak of a bf16 matrix product", "figure", tera_multiply_adds=round(peak / 1e12, 1))
    precision = "bf16-mixed"
    fabric = Fabric(accelerator=bench.device, devices=1, precision=precision)
    rivals: dict[str, float] = {}
    for name in recipes:
        job = name.split("_")[0]
        batch = 2 if bench.tiny else BATCHES[job]
        patterns = ("sparse", "dense") if name.endswith("_t") else ("sparse",)
        for kind in patterns:
            if time.monotonic() > bench.until:
                bench.note(f"{name}, {kind}", "not run", reason="no time left")
                continue
            rate, figures = step_rate(bench, fabric, name, kind, batch, peak)
            if kind == "dense":
                rivals[job] = rate
            bench.note(f"{name}, {kind}", "figure", images_per_second=round(rate, 1), batch=batch, **figures)
        if job == "finetune" and "timm" not in rivals and time.monotonic() < bench.until:
            rivals["timm"] = timm_rate(bench, fabric, batch)
            bench.note("timm's dense ViT-B, finetuning", "figure", images_per_second=round(rivals["timm"], 1))


def step_rate(
    bench: Bench, fabric: Fabric, name: str, kind: str, batch: int, peak: float
) -> tuple[float, dict[str, Any]]:
    """Images per second of the loop's own step, its share of the peak, and its memory against the plan's."""
    sizes = {"model": {"args": {"depth": 2}}} if bench.tiny else {}
    config = recipe(name, **sizes, **({"sparse": {"pattern": "dense"}} if kind == "dense" else {}))
    if bench.tiny and name.startswith("segment"):
        config.out_indices, config.data = [0, 0, 0, 1], config.data
        return 0.0, {"note": "four blocks are needed: not run tiny"}
    task = task_class(config.task)(config)
    task.class_names = [str(number) for number in range(task.dataset_size[1])]
    plan = BatchPlan.make(batch, batch, None, 1)
    seed_all(0, 0)
    model = task.build(task.card(), config.model.drop_path)
    make_sparse(model, config.sparse)
    task.prepare(model, fabric, plan)
    compiling = time.perf_counter()
    forward = task.wrapped(model)
    wrapped, optimizer = fabric.setup(
        forward if bench.tiny else torch.compile(forward), make_optimizer(model, config.optim)
    )
    masks = MaskSchedule(model)
    example = {key: random_like(value).to(bench.device) for key, value in task.example_batch(model, batch).items()}

    def backward() -> None:
        fabric.backward(task.loss(wrapped, example))

    def step() -> None:
        optimizer_step(model, optimizer, masks.step(0.0), backward, config.sparse, config.optim)

    model.train()
    step()
    synchronize(bench)
    compiling = time.perf_counter() - compiling
    if bench.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = timed(bench, step, 2 if bench.tiny else 8)
    figures: dict[str, Any] = {"compile_seconds": round(compiling, 1)}
    counted = meta_model(task)
    forwards = task.forwards(counted)
    dense = sum(f.total.dense for f in forwards[: 2 if name.startswith(("pretrain", "segment")) else 1])
    figures["share_of_peak"] = round(3 * dense * batch / seconds / peak, 3)
    if bench.device == "cuda":
        measured = torch.cuda.max_memory_allocated()
        del wrapped, optimizer, example, model
        planned = step_memory(task, meta_model(task), plan, "bf16").total
        figures |= {"peak_gib": round(measured / 2**30, 2), "planned_gib": round(planned / 2**30, 2)}
        torch.cuda.empty_cache()
    torch._dynamo.reset()
    return batch / seconds, figures


def random_like(value: torch.Tensor) -> torch.Tensor:
    """Random bytes for images; other tensors as they are."""
    return torch.randint(0, 256, value.shape, dtype=torch.uint8) if value.dim() == 4 else value


def timm_rate(bench: Bench, fabric: Fabric, batch: int) -> float:
    """Images per second of timm's dense ViT-B, fused AdamW, compiled."""
    args = {"depth": 2} if bench.tiny else {}
    model = timm.create_model("vit_base_patch16_224", **args).to(bench.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    forward = model if bench.tiny else torch.compile(model)
    images = torch.randn(batch, 3, 224, 224, device=bench.device)
    target = torch.zeros(batch, dtype=torch.long, device=bench.device)

    def step() -> None:
        with fabric.autocast():
            loss = nn.functional.cross_entropy(forward(images).float(), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return batch / timed(bench, step, 2 if bench.tiny else 8)


PARTS: dict[str, Callable[[Bench], None]] = {
    "masks": masks_are_equal, "frozen": frozen_masks_follow, "jobs": jobs_agree_with_cpu, "resume": jobs_resume,
    "steps": steps, "schedules": schedules_run, "compile": compiled_agrees, "memory": out_of_memory,
}  # fmt: skip


def main() -> None:
    """Run the parts; exit status 1 if one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-results")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--recipes", choices=RECIPES, nargs="+", default=RECIPES, help="of the part steps")
    parser.add_argument("--minutes", type=float, default=8.0)
    given = parser.parse_args()
    bench = Bench(given.device, given.out, given.minutes)
    name = torch.cuda.get_device_name() if given.device == "cuda" else "CPU"
    bench.note("machine", "figure", device=name, torch=torch.__version__, timm=timm.__version__)
    for part, work in PARTS.items():
        if part in given.only:
            bench.run(part, partial(work, recipes=given.recipes) if work is steps else work)
    bench.file.close()
    lines = [json.loads(line) for line in (given.out / "gpu.jsonl").read_text().splitlines()]
    wrong = [line["part"] for line in lines if line["verdict"] == "WRONG"]
    print(
        f"{sum(line['verdict'] == 'right' for line in lines)} right, {len(wrong)} WRONG: {', '.join(wrong) or 'none'}"
    )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
