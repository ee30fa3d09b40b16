"""The pretrainings that both demos start from."""

from sparsemae.study.stages import Stage

DENSE = ("--sparse.pattern", "dense")
SMALL = (*DENSE, "--model.args", "{patch_size: 7, embed_dim: 32, depth: 4, num_heads: 4}")
PRETRAINING = [
    Stage("pretrain-sparse", "pretrain", "sparse MAE", required=True),
    Stage("pretrain-dense", "pretrain", "dense MAE", DENSE),
    Stage("pretrain-small", "pretrain", "small dense MAE", SMALL, cost=0.6),
]
