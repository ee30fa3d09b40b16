"""The pretrainings that both demos start from."""

from sparsemae.study.stages import Stage

DENSE = ("--sparse.pattern", "dense")
SMALL = (*DENSE, "--model.args", "{patch_size: 7, embed_dim: 36, depth: 4, num_heads: 4, mlp_ratio: 4.8}")
"""As many parameters as the sparse network keeps."""
PRETRAINING = [
    Stage("pretrain-sparse", "pretrain", "sparse MAE", required=True),
    Stage("pretrain-dense", "pretrain", "dense MAE", DENSE),
    Stage("pretrain-small", "pretrain", "small dense MAE", SMALL, cost=0.6),
]
