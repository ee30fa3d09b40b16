"""timm's ViT with the field's names: the autoencoder, the classifier, weights in and out. Knows nothing of sparsity."""

from sparsemae.models.mae import MAEOutput, MaskedAutoencoder
from sparsemae.models.vit import ModelConfig, build_vit
from sparsemae.models.weights import Loaded, load_weights

__all__ = ["Loaded", "MAEOutput", "MaskedAutoencoder", "ModelConfig", "build_vit", "load_weights"]
