"""Memory of one training step, without taking it: the real step runs on fake tensors, whose storages are followed.

A fake tensor has a shape, a dtype and a lifetime but no data, so that autograd saves, frees and accumulates as it
would, for any batch, in seconds and in no memory. What an operator takes inside itself, and what an allocator wastes,
is not seen; nor is a GPU's context. On a CPU the real peak of a ViT-B's step is 8 to 9 % higher, and that of bf16 at
384 wide and 8 images 26 %, most of it holes in glibc's heap: with MALLOC_MMAP_THRESHOLD_=65536 it is 0 and 9 %.
Formulas per layer would be shorter, and wrong at the next change of a layer.
"""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsemae.data.sampling import BatchPlan
from sparsemae.sparsity import MaskSchedule, Topology, iter_sparse
from sparsemae.tasks.task import Task
from sparsemae.training.optim import make_optimizer
from sparsemae.training.step import optimizer_step

_MASKING = (
    torch.ops.aten.where,
    torch.ops.aten.masked_fill,
    torch.ops.sparsemae.kept_bf16,
    torch.ops.sparsemae.select_kept_bf16,
)


@dataclass(frozen=True)
class StepMemory:
    """Bytes on one device at the peak of an optimizer step, by what they are for."""

    weights: int
    """Parameters and buffers."""
    gradients: int
    """Gradients alive at the peak."""
    optimizer: int
    """Adam's two moments."""
    masks: int
    """Masks (held, and those of the topology log) and masked copies of the weights."""
    activations: int
    """All else: what the forward saves for the backward, and what is under way at the peak."""

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return self.weights + self.gradients + self.optimizer + self.masks + self.activations


def step_memory(task: Task[Any], model: nn.Module, batches: BatchPlan, precision: str = "bf16") -> StepMemory:
    """The peak of an optimizer step as the loop takes it, once optimizer state and topology log exist.

    A batch counts as activations. From the second micro-batch on, a forward finds gradients there; with several
    processes the first one does, too: gradients are views of the buckets they are gathered in, which stay.

    Args:
        task: prepared for ``batches``.
        model: its model, on the meta device; its parameters become fake ones.
        precision: bf16 (autocast), fp32 or fp64, as in the trainer.
    """
    config = task.config
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    if precision == "fp64":  # Fabric turns a batch's floats into doubles, too
        model.register_forward_pre_hook(lambda _, batch: tuple(x.double() if torch.is_tensor(x) else x for x in batch))
    with FakeTensorMode():
        dtype = torch.float64 if precision == "fp64" else torch.float32
        # fake CPU tensors in the places of meta ones: autocast knows no meta device
        model._apply(  # type: ignore[no-untyped-call]
            lambda t: torch.empty(t.shape, dtype=dtype if isinstance(t, nn.Parameter) else t.dtype)
        )
        model.train()
        with _Live(model) as live:
            optimizer = make_optimizer(model, config.optim)
            live.optimizer = optimizer
            # reference and last look: one mask until the first epoch ends, then two
            topology = [Topology(model), Topology(model)] if any(iter_sparse(model)) else []
            masks, forward = MaskSchedule(model, in_bf16=precision == "bf16"), task.wrapped(model)

            def backward() -> None:
                for parameter in model.parameters() if batches.world > 1 else ():
                    parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
                for _ in range(min(batches.accumulate, 2)):
                    with autocast:
                        loss = task.loss(forward, task.example_batch(model, batches.micro_batch))
                    loss.backward()  # type: ignore[no-untyped-call]
                    del loss

            for _ in range(2):  # the first step makes the optimizer's state
                live.forget_peak()
                optimizer_step(model, optimizer, masks.step(0.0), backward, config.sparse, config.optim)
            del topology
    return live.peak  # type: ignore[no-any-return]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the storages alive, and what they were at their highest."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.parameters = list(model.parameters())
        self.optimizer: torch.optim.Optimizer | None = None
        self.total = self.masks = 0
        self._is_mask: dict[int, bool] = {}  # by the storage's address; each alive
        tensors = (*model.parameters(), *model.buffers())
        for tensor in tensors:
            self._follow(tensor, is_mask=False)
        self.weights = sum(map(_bytes, tensors))
        self.forget_peak()

    def forget_peak(self) -> None:
        """Begin to look for a peak from now on."""
        self.peak = StepMemory(0, 0, 0, 0, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        masking = func.overloadpacket in _MASKING
        if func.overloadpacket is torch.ops.aten._to_copy:  # autocast's copy of a masked weight
            masking = self._is_mask.get(args[0].untyped_storage()._cdata, False)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._follow(leaf, masking or leaf.dtype is torch.bool)
        if self.total > self.peak.total:
            self._note_peak()
        return result

    def _follow(self, tensor: Tensor, is_mask: bool) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._is_mask:
            return
        self._is_mask[key] = is_mask
        self.total += size
        self.masks += size * is_mask
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.total -= size
        self.masks -= size * self._is_mask.pop(key)

    def _note_peak(self) -> None:
        gradients = sum(_bytes(p.grad) for p in self.parameters if p.grad is not None)
        states = self.optimizer.state.values() if self.optimizer else ()
        moments = sum(_bytes(value) for state in states for value in state.values() if isinstance(value, Tensor))
        rest = self.total - self.weights - gradients - moments - self.masks
        self.peak = StepMemory(self.weights, gradients, moments, self.masks, rest)
