"""Parts that hold what the device computes against a reference."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy
from torch import nn

from gpu import jobs
from gpu.bench import Bench
from sparsemae.commands.export import export
from sparsemae.data.crops import Crop, Crops
from sparsemae.options import ExportConfig, OptimConfig, SparseConfig
from sparsemae.options.tasks import FinetuneConfig
from sparsemae.sparsity import MaskSchedule, NMPattern, freeze, iter_sparse, nm_mask, sparsify
from sparsemae.tasks.loading import load_model
from sparsemae.training.checkpoint import list_checkpoints
from sparsemae.training.step import optimizer_step

NOISE = 0.1
"""Largest difference of two equal runs with which anything can be told."""


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


def crops_are_the_cpus(bench: Bench) -> None:
    """Crops of 500 x 375 px resized and flipped on the device, against the CPU's, and how many a second."""
    draw, sizes = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    found = []
    for number in range(4 if bench.tiny else 256):
        height, width = (int(torch.randint(150, most, (), generator=sizes)) for most in (376, 501))
        pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=draw)
        found.append(Crop(pixels, number % 2 == 1, 224, "bicubic"))
    crops = Crops.of(found)
    whole = crops.pin_memory() if bench.device == "cuda" else crops
    far = (crops.to("cpu").int() - whole.to(bench.device).cpu().int()).abs().float().mean(dim=(1, 2, 3)).max().item()
    rate = len(crops) / bench.seconds(lambda: whole.to(bench.device), 10)
    bench.check("crops as on the CPU", far < 1, of_255_in_the_mean=round(far, 4), images_per_second=round(rate))


def jobs_agree_with_cpu(bench: Bench) -> None:
    """A few steps of each job, on the CPU and on the device."""
    for job in jobs.KINDS:
        with tempfile.TemporaryDirectory() as folder:
            for name, device in (("cpu", "cpu"), ("device", bench.device), ("again", bench.device)):
                config = jobs.small(bench, job, f"{folder}/{name}", accelerator=device, max_steps=3)
                config.model = replace(config.model, drop_path=0.0)  # drawn, like erasing, on the device
                if isinstance(config, FinetuneConfig):
                    config.erasing = 0.0
                jobs.train(config)
            found = jobs.difference(jobs.weights(f"{folder}/cpu"), jobs.weights(f"{folder}/device"))
            noise = jobs.difference(jobs.weights(f"{folder}/again"), jobs.weights(f"{folder}/device"))
        figures = {"largest_relative_difference": f"{found:.1e}", "of_two_equal_runs": f"{noise:.1e}"}
        bench.check(f"{job}: 3 steps as on the CPU", found < 2e-2 + noise and noise < NOISE, **figures)


def jobs_resume(bench: Bench) -> None:
    """A run stopped in mid-epoch and continued, against one that was not; where two of these differ, by no more.

    The backward of bilinear upsampling adds in any order on a GPU, so that no segmentation is repeated bit for bit.
    """
    for job in jobs.KINDS:
        with tempfile.TemporaryDirectory() as folder:
            for name in ("whole", "again"):
                jobs.train(jobs.small(bench, job, f"{folder}/{name}"))
            jobs.train(jobs.small(bench, job, f"{folder}/cut", max_steps=3))
            assert list_checkpoints(Path(f"{folder}/cut/checkpoints"))
            jobs.train(jobs.small(bench, job, f"{folder}/cut"))
            found = jobs.difference(jobs.weights(f"{folder}/whole"), jobs.weights(f"{folder}/cut"))
            noise = jobs.difference(jobs.weights(f"{folder}/whole"), jobs.weights(f"{folder}/again"))
        figures = {"largest_relative_difference": f"{found:.1e}", "of_two_equal_runs": f"{noise:.1e}"}
        bench.check(f"{job}: resumed in mid-epoch", found <= 3 * noise and noise < NOISE, **figures)


def schedules_run(bench: Bench) -> None:
    """Fixed mask, gradual N:M, late freeze, moving average, accumulation: each ends frozen and N:M."""
    ways: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "fixed": ({"mask": "fixed"}, {}), "gradual": ({"schedule": "gradual"}, {}),
        "freeze_epoch": ({"freeze_epoch": 1.0}, {}), "decoupled": ({"term": "decoupled", "strength": 0.5}, {}),
        "ema": ({}, {"ema_decay": 0.9}), "accumulation": ({}, {"device_batch": 8}),
        "bf16": ({}, {"precision": "bf16"}), "compiled": ({}, {"compile": True, "max_steps": 2}),
    }  # fmt: skip
    for name, (sparse, trainer) in ways.items():
        with tempfile.TemporaryDirectory() as folder, bench.compiler():
            config = jobs.small(bench, "finetune", f"{folder}/run", **trainer)
            config.sparse = replace(config.sparse, **sparse)
            jobs.train(config)
            state = jobs.weights(f"{folder}/run")
        kept = {k: v for k, v in state.items() if k.endswith("weight_mask")}
        groups = [mask.reshape(-1, 32).sum(dim=1) for mask in kept.values()]
        zeros = all((state[k.removesuffix("_mask")][~mask] == 0).all() for k, mask in kept.items())
        bench.check(f"finetune, {name}", bool(groups) and zeros and all((g == 2).all() for g in groups))


def compiled_agrees(bench: Bench) -> None:
    """The compiled training forward against the eager one, fp32, without drop path."""
    found = {}
    with tempfile.TemporaryDirectory() as folder, bench.compiler():
        for compiled in (False, True):
            config = jobs.small(bench, "finetune", f"{folder}/{compiled}", compile=compiled, max_steps=3)
            config.model = replace(config.model, drop_path=0.0)
            jobs.train(config)
            found[compiled] = jobs.weights(f"{folder}/{compiled}")
    largest = jobs.difference(found[False], found[True])
    bench.check("compile as eager", largest < 1e-2, largest_relative_difference=f"{largest:.1e}")


def frozen_masks_follow(bench: Bench) -> None:
    """A layer frozen in mid-training and moved to the device stays frozen, whatever momentum the optimizer has."""
    model = sparse_linear().to(bench.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(6):
        if step == 3:
            freeze(model.cpu())
            model.to(bench.device)
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
    bench.needs_cuda()  # a CPU swaps
    held = torch.empty(int(0.995 * torch.cuda.mem_get_info()[0]), dtype=torch.uint8, device=bench.device)
    said = ""
    with tempfile.TemporaryDirectory() as folder:
        config = jobs.small(bench, "finetune", f"{folder}/run")
        config.trainer = replace(config.trainer, global_batch=128)
        config.model = replace(config.model, args={**config.model.args, "embed_dim": 768, "num_heads": 12})
        try:
            jobs.train(config)
        except ValueError as error:
            said = str(error)
    del held
    torch.cuda.empty_cache()
    bench.check("out of memory", "out of memory" in said and "device_batch" in said, said=said[:160])


def one_process_of_ddp(bench: Bench) -> None:
    """Two steps by DDP of one process, over NCCL on a GPU: the weights of two steps without it, bit for bit."""
    backend = "nccl" if bench.device == "cuda" else "gloo"
    ways = {"plain": "auto", "ddp": DDPStrategy(process_group_backend=backend, gradient_as_bucket_view=True)}
    found = {}
    with patch.dict(os.environ):  # Fabric leaves its ranks there
        for name, strategy in ways.items():
            torch.manual_seed(0)
            model = sparse_linear()
            fabric = Fabric(accelerator=bench.device, devices=1, strategy=strategy)
            fabric.launch()
            wrapped, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
            images, masks = torch.randn(4, 64, device=bench.device), MaskSchedule(model)
            for _ in range(2):
                backward = partial(_backward, fabric, wrapped, images)
                optimizer_step(model, optimizer, masks.step(0.0), backward, SparseConfig(), OptimConfig())
            found[name] = {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
        reached = fabric.all_reduce(torch.ones(1, device=bench.device), reduce_op="sum")
        dist.destroy_process_group()
    same = all(torch.equal(found["plain"][key], found["ddp"][key]) for key in found["plain"])
    bench.check(f"one process over {backend}", same and reached.item() == 1)


def _backward(fabric: Fabric, model: Any, images: torch.Tensor) -> None:
    fabric.backward(model(images).square().mean())


def exported_agrees(bench: Bench) -> None:
    """A classifier trained on the device, as timm opens it there, against the model on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        jobs.train(jobs.small(bench, "finetune", f"{folder}/run", max_steps=3))
        export(ExportConfig(f"{folder}/run", f"{folder}/timm"))
        opened = timm.create_model(f"local-dir:{folder}/timm", pretrained=True).eval().to(bench.device)
        model, card = load_model(f"{folder}/run")
    images = torch.randn(8, 3, card.input.img_size, card.input.img_size)
    with torch.inference_mode():
        wanted, got = model.eval()(images), opened(images.to(bench.device)).cpu()
    found = float((got - wanted).abs().max() / wanted.std())
    bench.check("export: timm on the device", found < 1e-3, largest_relative_difference=f"{found:.1e}")
