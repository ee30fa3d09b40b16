"""Parts that measure: each recipe's step at ViT-B in bf16, compiled, and what it is to be compared with."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from gpu import jobs
from gpu.bench import Bench
from sparsemae.costs.step_memory import step_memory
from sparsemae.data.sampling import BatchPlan, seed_all
from sparsemae.sparsity import MaskSchedule, NMPattern, freeze, iter_sparse, sparsify
from sparsemae.sparsity.pattern import select_mask
from sparsemae.tasks import task_class
from sparsemae.tasks.sparse import make_sparse, meta_model
from sparsemae.training.optim import make_optimizer
from sparsemae.training.step import optimizer_step

BATCHES = {"pretrain": 256, "finetune": 128, "segment": 16}
"""Images per forward of the timed steps."""
TINY: dict[str, Any] = {
    "model": {"args": {"embed_dim": 64, "depth": 2, "num_heads": 2}}, "data": {"img_size": 64},
}  # fmt: skip
TINY_OF_JOB: dict[str, dict[str, Any]] = {
    "pretrain": {"decoder": {"embed_dim": 32, "depth": 1, "num_heads": 2}},
    "finetune": {},
    "segment": {
        "model": {"args": {"embed_dim": 64, "depth": 4, "num_heads": 2}}, "out_indices": [0, 1, 2, 3],
        "head": {"width": 8, "auxiliary_width": 8}, "inference": {"stride": 64},
    },
}  # fmt: skip
RUNS = 8


def peak(bench: Bench) -> None:
    """bf16 multiply-adds per second of a large matrix product: what the device reaches at best."""
    bench.note("peak of a bf16 matrix product", "figure", tera_multiply_adds=round(_peak(bench) / 1e12, 3))


def _peak(bench: Bench) -> float:
    if bench.peak_flops is None:
        side = 512 if bench.tiny else 8192
        a, b = (torch.randn(side, side, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
        bench.peak_flops = side**3 / bench.seconds(lambda: a @ b, 20)
    return bench.peak_flops


def recipe_steps(bench: Bench, name: str, patterns: tuple[str, ...]) -> None:
    """A recipe's optimizer step, sparse, and dense where the recipe of another pattern does not measure the same."""
    for kind in patterns:
        rate, figures = _step_rate(bench, name, kind)
        bench.note(f"{name}, {kind}", "figure", images_per_second=round(rate, 1), **figures)


pretrain_t = partial(recipe_steps, name="pretrain_t", patterns=("sparse", "dense"))
finetune_t = partial(recipe_steps, name="finetune_t", patterns=("sparse", "dense"))
segment_t = partial(recipe_steps, name="segment_t", patterns=("sparse", "dense"))
pretrain_s = partial(recipe_steps, name="pretrain_s", patterns=("sparse",))
finetune_s = partial(recipe_steps, name="finetune_s", patterns=("sparse",))
segment_s = partial(recipe_steps, name="segment_s", patterns=("sparse",))


def _fabric(bench: Bench) -> Fabric:
    return Fabric(accelerator=bench.device, devices=1, precision="bf16-mixed")


def _step_rate(bench: Bench, name: str, kind: str) -> tuple[float, dict[str, Any]]:
    """Images per second of the loop's own step, its share of the peak, its memory beside the plan's."""
    job = name.partition("_")[0]
    batch = 2 if bench.tiny else BATCHES[job]
    changes: dict[str, Any] = {**TINY, **TINY_OF_JOB[job]} if bench.tiny else {}
    config = jobs.recipe(name, **changes, **({"sparse": {"pattern": "dense"}} if kind == "dense" else {}))
    task = task_class(config.task)(config)
    task.class_names = [str(number) for number in range(task.dataset_size[1])]
    plan, fabric = BatchPlan.make(batch, batch, None, 1), _fabric(bench)
    gc.collect()
    torch.cuda.empty_cache()
    seed_all(0, 0)
    model = task.build(task.card(), config.model.drop_path)
    make_sparse(model, config.sparse)
    task.prepare(model, fabric, plan)
    begin = time.perf_counter()
    forward = task.wrapped(model)
    compiled = forward if bench.tiny else torch.compile(forward)
    wrapped, optimizer = fabric.setup(compiled, make_optimizer(model, config.optim))
    masks = MaskSchedule(model)
    example = {key: _random_like(value).to(bench.device) for key, value in task.example_batch(model, batch).items()}

    losses = []

    def backward() -> None:
        losses.append(task.loss(wrapped, example))
        fabric.backward(losses[-1])

    def step() -> None:
        optimizer_step(model, optimizer, masks.step(0.0), backward, config.sparse, config.optim)

    model.train()
    step()
    _check_finite(losses)
    begin = time.perf_counter() - begin
    if bench.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = bench.seconds(step, RUNS)
    measured = torch.cuda.max_memory_allocated() if bench.device == "cuda" else None
    dense = sum(f.total.dense for f in task.forwards(meta_model(task))[: 1 if job == "finetune" else 2])
    planned = step_memory(task, meta_model(task), plan, "bf16").total
    torch._dynamo.reset()
    return batch / seconds, {
        "batch": batch, "compile_seconds": round(begin, 1),
        "share_of_peak": round(3 * dense * batch / seconds / _peak(bench), 3),
        **({} if measured is None else {"peak_gib": round(measured / 2**30, 2)}),
        "planned_gib": round(planned / 2**30, 2),
    }  # fmt: skip


def _check_finite(losses: list[Tensor]) -> None:
    if not losses[-1].isfinite().item():
        raise ValueError(f"wanted a finite loss, got {losses[-1].item()}")
    losses.clear()


def _random_like(value: Tensor) -> Tensor:
    """Random bytes for images; other tensors as they are."""
    return torch.randint(0, 256, value.shape, dtype=torch.uint8) if value.dim() == 4 else value


def timm_step(bench: Bench) -> None:
    """timm's dense ViT-B, fused AdamW, compiled, at the batch of finetuning."""
    model = timm.create_model("vit_base_patch16_224", **(_tiny_vit() if bench.tiny else {}))
    target = torch.zeros(_batch(bench, "finetune"), dtype=torch.long, device=bench.device)

    def loss(forward: nn.Module, images: Tensor) -> Tensor:
        return nn.functional.cross_entropy(forward(images).float(), target)

    bench.note("timm's dense ViT-B, finetuning", "figure", **_rival(bench, "finetune", model, loss))


def vitmae_step(bench: Bench) -> None:
    """transformers' dense ViTMAE, at the batch and the mask ratio of pretraining."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    small: dict[str, Any] = {
        "image_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128,
        "decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 64,
    }  # fmt: skip
    model = ViTMAEForPreTraining(ViTMAEConfig(mask_ratio=0.25, norm_pix_loss=True, **(small if bench.tiny else {})))
    figures = _rival(bench, "pretrain", model, lambda forward, images: forward(images).loss)
    bench.note("transformers' dense ViTMAE", "figure", **figures)


def _batch(bench: Bench, job: str) -> int:
    return 2 if bench.tiny else BATCHES[job]


def _tiny_vit() -> dict[str, Any]:
    return {**TINY["model"]["args"], **TINY["data"]}


def _rival(bench: Bench, job: str, model: Any, loss: Callable[[Any, Tensor], Tensor]) -> dict[str, Any]:
    """Images per second of somebody else's model in the plainest loop."""
    fabric, batch, side = _fabric(bench), _batch(bench, job), 64 if bench.tiny else 224
    model = model.to(bench.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    forward = model if bench.tiny else torch.compile(model)
    images = torch.randn(batch, 3, side, side, device=bench.device)

    losses = []

    def step() -> None:
        with fabric.autocast():
            losses.append(loss(forward, images))
        losses[-1].backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    rate = batch / bench.seconds(step, RUNS)
    _check_finite(losses)
    torch._dynamo.reset()
    return {"images_per_second": round(rate, 1), "batch": batch}


def mask_kernel(bench: Bench) -> None:
    """The masks of ViT-B's layers and their kept weights in bf16: torch's operations against the kernel's one pass."""
    bench.needs_cuda()
    from sparsemae.sparsity import kernel

    pattern, right, times = NMPattern(2, 32), True, {"torch": 0.0, "kernel": 0.0}
    for out, into in ((2304, 768), (768, 768), (3072, 768), (768, 3072)):
        weight = torch.randn(out, into).mul(4).round().div(4)  # many ties
        weight[0], weight[1], weight[2, ::2] = 0.0, -0.0, 1e-40
        weight = weight.to(bench.device)
        mask, kept = _by_torch(weight, pattern)
        got = kernel.select_in_one_pass(weight, pattern.n, pattern.m)
        right &= torch.equal(got[0], mask) and torch.equal(got[1].view(torch.int16), kept.view(torch.int16))
        times["torch"] += 12e3 * bench.seconds(partial(_by_torch, weight, pattern), 20)
        times["kernel"] += 12e3 * bench.seconds(partial(kernel.select_in_one_pass, weight, pattern.n, pattern.m), 20)
    bench.check("masks by one kernel", right, **{f"{way}_milliseconds": round(ms, 3) for way, ms in times.items()})


def _by_torch(weight: Tensor, pattern: NMPattern) -> tuple[Tensor, Tensor]:
    mask = select_mask(weight, pattern)
    return mask, torch.where(mask, weight, 0.0).bfloat16()


def sparse_cores(bench: Bench) -> None:
    """A frozen 2:32 ViT-B, whose every four weights have two zeros at least, through the 2:4 sparse tensor cores."""
    bench.needs_cuda()
    model = timm.create_model("vit_base_patch16_224", **(_tiny_vit() if bench.tiny else {})).eval()
    sparsify(model, "2:32", include=["blocks.*.attn.*", "blocks.*.mlp.*"])
    freeze(model)
    model = model.to(bench.device, torch.bfloat16)
    batch, side = _batch(bench, "finetune"), 64 if bench.tiny else 224
    images = torch.randn(batch, 3, side, side, device=bench.device, dtype=torch.bfloat16)
    with torch.inference_mode():
        wanted, dense = model(images), bench.seconds(lambda: model(images), 20)
        for _, layer in iter_sparse(model):
            layer.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(layer.weight), requires_grad=False)
            layer.use_dense = True
            del layer.weight_mask
        got, sparse = model(images), bench.seconds(lambda: model(images), 20)
    found = float((got.float() - wanted.float()).abs().max() / wanted.float().std())
    rates = {"dense_images_per_second": round(batch / dense, 1), "sparse_images_per_second": round(batch / sparse, 1)}
    bench.check("2:32 by 2:4 sparse cores", found < 5e-2, largest_relative_difference=f"{found:.1e}", **rates)
