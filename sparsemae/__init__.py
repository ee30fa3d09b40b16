"""SparseMAE: small vision transformers cut out of a ViT by N:M sparse training with masked autoencoders.

Importing the package is free: training names load torch when they are first touched (PEP 562).
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "sparsemae.card": ("InputSpec", "ModelCard"),
    "sparsemae.loading": ("load",),
    "sparsemae.packing.pack": ("pack",),
    "sparsemae.predictor": ("Prediction", "Predictor"),
    "sparsemae.sparsity": (
        "Criterion", "NMLinear", "NMPattern", "Topology", "add_srste_gradient", "dense_weights", "densify", "freeze",
        "hold_masks", "iter_sparse", "magnitude", "nm_mask", "sparsify", "summarize",
    ),
    "sparsemae.tasks.loading": ("load_model",),
    "sparsemae.models": ("Loaded", "MAEOutput", "MaskedAutoencoder", "load_weights"),
}  # fmt: skip
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sparsemae' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return ["__version__", *sorted(_HOME)]
