"""Heads of a segmenter that are token by token, so that a packed file can hold them: no convolution, no statistics of a
batch.

Both are dense, as every head here: they start at random, where magnitudes say nothing about what to keep, and they are
a small part of what the encoder keeps. The one with four maps is SegFormer's (arXiv 2105.15203) but for three things:
its maps have one stride; what it projects is summed, which is its concatenation followed by a linear layer; and it
normalizes by layer, not by batch.
"""

from collections.abc import Sequence

from torch import Tensor, nn


class LinearHead(nn.Module):
    """The last of some maps ``[B, D, h, w]`` to logits ``[B, C, h, w]``: one linear layer."""

    def __init__(self, embed_dim: int, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(embed_dim, num_classes)
        _init(self)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        logits: Tensor = self.classifier(self.dropout(maps[-1].permute(0, 2, 3, 1)))
        return logits.permute(0, 3, 1, 2)


class SegFormerHead(nn.Module):
    """Maps ``[B, D, h, w]`` to logits ``[B, C, h, w]``: normalized, projected, summed, fused, classified.

    ``classifier(gelu(fuse(norm(sum_k projection_k(norm_k(x_k))))))``, all of it for each token by itself.
    """

    def __init__(
        self, embed_dim: int, maps: int, width: int, num_classes: int, dropout: float = 0.0, eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(embed_dim, eps=eps) for _ in range(maps)])
        self.projections = nn.ModuleList([nn.Linear(embed_dim, width, bias=False) for _ in range(maps)])
        self.norm = nn.LayerNorm(width, eps=eps)
        self.fuse = nn.Linear(width, width)
        self.activation = nn.GELU()
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(width, num_classes)
        _init(self)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        parts = zip(self.norms, self.projections, maps, strict=True)
        total = sum(project(norm(x.permute(0, 2, 3, 1))) for norm, project, x in parts)
        fused = self.activation(self.fuse(self.norm(total)))
        logits: Tensor = self.classifier(self.dropout(fused))
        return logits.permute(0, 3, 1, 2)


def _init(head: nn.Module) -> None:
    """By the number of inputs: with ViTs' 0.02, a head this narrow lags behind for hundreds of steps."""
    for module in head.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
