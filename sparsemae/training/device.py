"""How a device computes: in which numbers, compiled or not, in the same order each time or not."""

import os
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from sparsemae.models import use_plain_attention
from sparsemae.options import TrainerConfig

PRECISIONS: dict[str, Any] = {"bf16": "bf16-mixed", "fp32": "32-true", "tf32": "32-true", "fp64": "64-true"}
"""What Fabric calls them."""


def resolved_precision(trainer: TrainerConfig) -> str:
    """What trainer.precision comes to on this machine.

    auto is bf16 on CUDA and on processors with AVX512-BF16; elsewhere a CPU emulates it, several times slower.
    """
    if trainer.precision != "auto":
        return trainer.precision
    if trainer.accelerator != "cpu" and torch.cuda.is_available():
        return "bf16"
    return "bf16" if getattr(torch.cpu, "_is_avx512_bf16_supported", bool)() else "fp32"


def resolved_compile(trainer: TrainerConfig, device: torch.device) -> bool:
    """What trainer.compile comes to."""
    return device.type == "cuda" if trainer.compile == "auto" else trainer.compile


def check_precision(trainer: TrainerConfig, precision: str) -> None:
    """Raise ValueError on a precision that there is not, or not here."""
    if precision not in PRECISIONS:
        raise ValueError(
            f"trainer.precision: wanted auto, {', '.join(PRECISIONS)}, got {trainer.precision}"
            + " (fp16's loss scale would multiply SR-STE's term, and its range loses small gradients)"
            * ("16" in trainer.precision)
        )
    if precision == "tf32" and (trainer.accelerator == "cpu" or not torch.cuda.is_available()):
        raise ValueError("trainer.precision: tf32 is how a CUDA device may multiply fp32, and there is none")


def set_switches(trainer: TrainerConfig) -> None:
    """Set torch's switches for the whole process; before the device is used."""
    tf32 = trainer.precision == "tf32"  # torch's own default: for convolutions alone
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    torch.use_deterministic_algorithms(trainer.deterministic)
    if trainer.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic with one of that size


def training_forward(forward: nn.Module, trainer: TrainerConfig, device: torch.device) -> Any:
    """The forward as it is trained, by settings that are resolved: compiled, and on a CPU with the faster attention.

    Batch norms that are synchronized over processes do not go with torch.compile: beside them the ViT's blocks alone
    are compiled.
    """
    if device.type == "cpu" and trainer.precision == "bf16":
        use_plain_attention(forward)
    if not trainer.compile:
        return forward
    if not any(isinstance(module, nn.SyncBatchNorm) for module in forward.modules()):
        return torch.compile(forward)
    for vit in (module for module in forward.modules() if isinstance(module, VisionTransformer)):
        for block in vit.blocks:
            block.compile()
    return forward
