"""timm's ViT with the field's names: the autoencoder, the classifier, weights in and out. Knows nothing of sparsity."""

from sparsemae.models.mae import MAEOutput, MaskedAutoencoder
from sparsemae.models.vit import build_vit, patch_side, use_plain_attention
from sparsemae.models.weights import Loaded, load_weights

__all__ = ["Loaded", "MAEOutput", "MaskedAutoencoder", "build_vit", "load_weights", "patch_side", "use_plain_attention"]
