"""Turning a model sparse and back: `sparsify`, the two contexts, `freeze`, `densify`, and the SR-STE term.

A layer is converted by changing the class of the very same object. Parameters, hooks, buffers, dtype,
device, training mode and every sharing of modules or weights therefore stay what they were; a new module
with copied members would have to remember each of them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from sparsemae.sparsity import passes
from sparsemae.sparsity.linear import NMLinear, divided, whole
from sparsemae.sparsity.pattern import Criterion, NMPattern, check_divides, check_finite, magnitude, nm_mask

_BYPASS_FORWARD = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def sparsify(
    model: nn.Module,
    pattern: str | NMPattern,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    criterion: Criterion = magnitude,
) -> list[str]:
    """Make linear layers of any module tree N:M sparse, in place; state-dict keys stay unchanged.

    Args:
        model: any module; timm ViTs of every size and pretraining need no further argument.
        pattern: ``"2:32"`` keeps 2 of every 32 input features.
        include: glob patterns on module names. None: every ``nn.Linear`` below a module list named ``blocks``.
        exclude: glob patterns on module names to leave dense.
        criterion: what of each group is kept: a function of the weight, see `sparsemae.Criterion`.

    Returns:
        Names of the converted layers, in module order. A module shared under several names is listed once.

    Raises:
        ValueError: nothing matched, a glob matched nothing, ``m`` does not divide a layer's ``in_features``,
            a weight or a score is NaN or infinite, a layer is of a subclass of ``nn.Linear`` or lies in a module that
            bypasses its forward. Nothing is converted then.
    """
    pattern = NMPattern.parse(pattern)
    names = [name for name, _ in model.named_modules()]
    for glob in [*(include or ()), *exclude]:
        if not any(fnmatchcase(name, glob) for name in names):
            raise ValueError(f"sparsify: no module matches {glob!r}; names look like {', '.join(names[1:6])}")

    chosen: dict[str, nn.Linear] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or any(fnmatchcase(name, glob) for glob in exclude):
            continue
        if not (_below_blocks(model, name) if include is None else any(fnmatchcase(name, glob) for glob in include)):
            continue
        _refuse_bypassed(model, name)
        if isinstance(module, NMLinear):
            continue
        if type(module) is not nn.Linear:
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            raise ValueError(f"{name}: wanted a plain nn.Linear, got a {kind}, whose forward may do more (exclude it)")
        check_divides(module.weight, pattern, name)
        check_finite(module.weight, name)
        if criterion is not magnitude:
            nm_mask(module.weight, pattern, name, criterion)
        chosen[name] = module
    if not chosen:
        where = "below a module list named `blocks`" if include is None else f"matching {list(include)}"
        raise ValueError(f"sparsify: wanted at least one nn.Linear {where}, got none (use include=[...])")

    for name, module in chosen.items():
        module.__class__ = NMLinear
        module.pattern = pattern  # type: ignore[assignment]
        if criterion is not magnitude:
            module.criterion = criterion  # type: ignore[assignment]
        parent = model.get_submodule(name.rpartition(".")[0])
        if hasattr(parent, "qkv_bias_separate"):  # timm's BEiT, EVA and Swin v2 otherwise hand qkv.weight to F.linear
            parent.qkv_bias_separate = True  # type: ignore[assignment]
    return list(chosen)


def _below_blocks(model: nn.Module, name: str) -> bool:
    parts = name.split(".")
    return any(
        part == "blocks" and isinstance(model.get_submodule(".".join(parts[: i + 1])), nn.ModuleList | nn.Sequential)
        for i, part in enumerate(parts[:-1])
    )


def _refuse_bypassed(model: nn.Module, name: str) -> None:
    parts = name.split(".")
    for i in range(len(parts)):
        parent = model.get_submodule(".".join(parts[:i]))
        if isinstance(parent, _BYPASS_FORWARD):
            raise ValueError(
                f"{name}: wanted a layer whose own forward runs, got one inside nn.{type(parent).__name__}, "
                "whose kernels read .weight directly (exclude it)"
            )


def iter_sparse(model: nn.Module) -> Iterator[tuple[str, NMLinear]]:
    """Yield ``(name, layer)`` of every sparse layer, each shared module once."""
    for name, module in model.named_modules():
        if isinstance(module, NMLinear):
            yield name, module


def _sparse_layers(model: nn.Module, caller: str) -> list[tuple[str, NMLinear]]:
    layers = list(iter_sparse(model))
    if not layers:
        raise ValueError(f"{caller}: wanted a model with sparse layers, got none (call sparsify first)")
    return layers


@contextmanager
def hold_masks(model: nn.Module, in_bf16: bool = False) -> Iterator[None]:
    """Keep the masks of now: each is computed once, however many forwards run inside.

    Args:
        in_bf16: these run under autocast to it, and the weights do not change meanwhile: the kept ones are held, too.
    """
    held = [layer for _, layer in iter_sparse(model) if not layer.frozen and layer.held_mask is None]
    for layer in held:
        layer.hold_mask(in_bf16)
    try:
        yield
    finally:
        for layer in held:
            layer.held_mask = layer.held_kept = None


@contextmanager
def dense_weights(model: nn.Module) -> Iterator[None]:
    """Forward with the full latent weights (a frozen layer has none left and stays sparse)."""
    switched = [layer for _, layer in iter_sparse(model) if not layer.use_dense]
    for layer in switched:
        layer.use_dense = True
    try:
        yield
    finally:
        for layer in switched:
            layer.use_dense = False


def freeze(model: nn.Module) -> list[str]:
    """Make today's masks permanent: pruned weights become exactly +0 and stay so, whatever the optimizer holds.

    Adds the bool ``<layer>.weight_mask``, saved beside the weight; moved zeros of a frozen layer are repaired.
    Returns the frozen layers' names.
    Raises ValueError if the model has no sparse layer or a weight is not finite.
    """
    layers = _sparse_layers(model, "freeze")
    for name, layer in layers:
        check_finite(whole(layer.weight), name)
    for name, layer in layers:
        layer.freeze(name)
    return [name for name, _ in layers]


def densify(model: nn.Module) -> list[str]:
    """Turn a frozen model into plain ``nn.Linear`` layers that hold the zeros; the masks go.

    Returns the layers' names. Raises ValueError if a layer is not frozen: its latent weights are another network.
    """
    layers = _sparse_layers(model, "densify")
    for name, layer in layers:
        if not layer.frozen:
            raise ValueError(f"densify: wanted a frozen model, got {name} with a moving mask (call freeze first)")
    for _, layer in layers:
        layer.drop_mask()
        del layer.pattern
        for name in ("held_mask", "held_kept", "use_dense", "pruned_scale", "criterion"):
            layer.__dict__.pop(name, None)
        layer.__class__ = nn.Linear  # type: ignore[assignment]
    return [name for name, _ in layers]


def shrink_pruned(optimizer: torch.optim.Optimizer, model: nn.Module, strength: float) -> None:
    """SR-STE's term decoupled: ``W -= lr * strength * (1 - M) * W``, as AdamW decouples its weight decay.

    Inside the gradient, Adam's second moment rescales the term; here nothing does. Call once per optimizer step, right
    after it, with the masks of the step still held. ``lr`` is that of each weight's own parameter group.
    """
    rates = {id(weight): group["lr"] for group in optimizer.param_groups for weight in group["params"]}
    for weight, mask in _moving_weights(model):
        if id(weight) in rates:
            with torch.no_grad():
                weight.copy_(torch.where(mask, weight, weight * (1 - rates[id(weight)] * strength)))


def add_srste_gradient(model: nn.Module, strength: float = 2e-4) -> None:
    """Add SR-STE's ``strength * (1 - M) * W`` to the gradients (arXiv 2102.04010, eq. 8).

    Call once per optimizer step: after unscaling and all-reduce, before clipping and the step. So the term does
    not depend on the number of processes or of accumulation steps. A weight shared by layers gets it once.
    """
    for weight, mask in _moving_weights(model):
        if weight.grad is None:
            continue
        with torch.no_grad():
            if passes.fits(weight, weight.grad) and mask.is_contiguous():
                passes.pull_pruned(weight.grad, weight, mask, strength)
            else:
                weight.grad.add_(weight.masked_fill(mask, 0.0).to(weight.grad.dtype), alpha=strength)


def zero_pruned(model: nn.Module) -> None:
    """Set the weights outside today's masks to 0: what is left is the sparse network alone. The masks still move."""
    for weight, mask in _moving_weights(model):
        with torch.no_grad():
            weight.copy_(torch.where(mask, weight, 0.0))


def _moving_weights(model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """(weight, mask) of the layers that are not frozen, a weight shared by layers once."""
    done: set[int] = set()
    for _, layer in iter_sparse(model):
        if not layer.frozen and id(layer.weight) not in done:
            done.add(id(layer.weight))
            yield layer.weight, divided(layer.current_mask(), layer.weight)
