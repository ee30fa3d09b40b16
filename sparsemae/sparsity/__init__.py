"""The N:M sparsity core: patterns, the sparse linear layer, conversion, topology. Knows nothing of vision."""

from sparsemae.sparsity.convert import (
    add_srste_gradient,
    dense_weights,
    densify,
    freeze,
    hold_masks,
    iter_sparse,
    shrink_pruned,
    sparsify,
    zero_pruned,
)
from sparsemae.sparsity.linear import NMLinear
from sparsemae.sparsity.pattern import Criterion, NMPattern, magnitude, nm_mask
from sparsemae.sparsity.schedule import MaskSchedule
from sparsemae.sparsity.topology import Movement, SparsitySummary, Topology, TopologyReport, summarize

__all__ = [
    "Criterion",
    "MaskSchedule",
    "Movement",
    "NMLinear",
    "NMPattern",
    "SparsitySummary",
    "Topology",
    "TopologyReport",
    "add_srste_gradient",
    "dense_weights",
    "densify",
    "freeze",
    "hold_masks",
    "iter_sparse",
    "magnitude",
    "nm_mask",
    "shrink_pruned",
    "sparsify",
    "summarize",
    "zero_pruned",
]
