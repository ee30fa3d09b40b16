"""Concurrent training of the full transformer: its loss and gradients against the two passes done by hand."""

from typing import Any

import pytest
import timm
import torch

from sparsemae.models import MaskedAutoencoder
from sparsemae.sparsity import NMPattern, iter_sparse, nm_mask, sparsify
from sparsemae.tasks.pretraining import ConcurrentLoss


def autoencoder() -> MaskedAutoencoder:
    torch.manual_seed(0)
    arguments = {"patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
    encoder = timm.create_model("vit_base_patch16_224", img_size=28, **arguments)
    return MaskedAutoencoder(encoder, 16, 1, 2).double()


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_both_passes_see_the_same_patches_and_share_the_weights(weight: float) -> None:
    model, full, pruned = autoencoder(), autoencoder(), autoencoder()
    sparsify(model, "2:32")
    for name, _ in iter_sparse(model):  # the slow twin: another model that holds the masked weights
        layer: Any = pruned.get_submodule(name)
        layer.weight.data *= nm_mask(layer.weight.data, NMPattern(2, 32))
    images, noise = torch.rand(3, 3, 28, 28, dtype=torch.float64), torch.rand(3, 16, dtype=torch.float64)
    loss = ConcurrentLoss(model, weight)(images, 0.25, noise)
    parts = [twin(images, 0.25, noise).loss for twin in (pruned, full)]
    torch.testing.assert_close(loss, parts[0] + weight * parts[1])
    loss.backward()
    for part, factor in zip(parts, (1, weight), strict=True):
        (factor * part).backward()
    for (name, parameter), one, other in zip(
        model.named_parameters(), pruned.parameters(), full.parameters(), strict=True
    ):
        gradients = [parameter.grad, one.grad, other.grad]
        if parameter.requires_grad:  # straight through: the gradient of the masked weight reaches all of W
            both, sparse, dense = (gradient for gradient in gradients if gradient is not None)
            torch.testing.assert_close(both, sparse + dense, msg=name)
