"""A trained classifier that another one learns from, beside the labels: its logits on the very images of a step."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from sparsemae.card import InputSpec
from sparsemae.models.hub import pretrained
from sparsemae.tasks.loading import TorchPredictor, load_model


@dataclass(frozen=True)
class Teacher:
    """A classifier, and what its images are like. It is no part of what is trained, nor of checkpoints."""

    model: nn.Module
    input: InputSpec

    @torch.no_grad()
    def logits(self, images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
        """``[B, C]`` of a student's images ``[B, 3, H, W]``, which were normalized by ``mean`` and ``std``."""
        own = [images.new_tensor(values).view(3, 1, 1) for values in (mean, std)]
        wanted = [images.new_tensor(values).view(3, 1, 1) for values in (self.input.mean, self.input.std)]
        if (tuple(mean), tuple(std)) != (self.input.mean, self.input.std):
            images = (images * own[1] + own[0] - wanted[0]) / wanted[1]
        size = (self.input.img_size, self.input.img_size)
        if images.shape[2:] != size:
            images = F.interpolate(images, size, mode="bicubic", antialias=True)
        result: Tensor = self.model(images)
        return result


def open_teacher(source: str, class_names: Sequence[str]) -> Teacher:
    """A run folder or weights file of ours; or ``timm:NAME``, whose classes are only counted: timm has no names.

    Raises ValueError if it cannot be had, or its classes are not those.
    """
    if source.startswith("timm:"):
        network = pretrained(source, "--teacher")
        if (got := network.num_classes) != (wanted := len(class_names)):
            raise ValueError(f"--teacher {source}: wanted a classifier of {wanted} classes, got one of {got}")
        data = resolve_model_data_config(network)
        model, spec = network.eval(), InputSpec(data["input_size"][-1], tuple(data["mean"]), tuple(data["std"]))
    else:
        network, card = load_model(source, "classify")
        for number, (own, theirs) in enumerate(zip_longest(class_names, card.class_names)):
            if own != theirs:
                raise ValueError(f"--teacher {source}: class {number}: wanted {own!r:.60}, got {theirs!r:.60}")
        model, spec = TorchPredictor(network, card).model, card.input
    return Teacher(model.requires_grad_(False), spec)


def distillation_loss(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """Soft distillation (DeiT, arXiv 2012.12877, section 4): T^2 KL(softmax(wanted / T) || softmax(logits / T)).

    Args:
        logits: the student's, ``[B, C]``; the mean over B is taken.
        wanted: the teacher's, ``[B, C]``.
    """
    student, teacher = (F.log_softmax(values / temperature, dim=1) for values in (logits, wanted))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2
