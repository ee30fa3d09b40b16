"""Small module trees to make sparse."""

import torch
import torch.nn.functional as F
from torch import nn

from sparsemae.sparsity import NMLinear, NMPattern, iter_sparse, nm_mask, sparsify

PATTERN = NMPattern(2, 8)


class Block(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))


class Net(nn.Module):
    """Encoder `blocks`, `decoder_blocks`, and a head that stays dense."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.decoder_blocks = nn.ModuleList([Block(width)])
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in [*self.blocks, *self.decoder_blocks]:
            x = block(x)
        return self.head(x)


def assert_untouched(model: nn.Module) -> None:
    assert not list(iter_sparse(model))
    assert not any(hasattr(module, "pattern") for module in model.modules())


def sparse_layer(out_features=6, in_features=16, dtype=torch.float64, seed=0, bias=True) -> NMLinear:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(in_features, out_features, bias=bias, dtype=dtype))
    sparsify(model, PATTERN, include=["0"])
    return model[0]


def sparse_mlp(dtype=torch.float64, seed=0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 24, dtype=dtype), nn.GELU(), nn.Linear(24, 4, dtype=dtype))
    sparsify(model, PATTERN, include=["*"])
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 16, generator=generator, dtype=dtype)).square().mean().backward()
        optimizer.step()


def masked(layer: NMLinear) -> torch.Tensor:
    return layer.weight.detach() * nm_mask(layer.weight, layer.pattern)


def is_plus_zero(values: torch.Tensor) -> bool:
    return bool((values == 0).all()) and not torch.signbit(values).any()
