"""Packed models on an ordinary CPU: numpy, safetensors, pillow and one native library; torch is never imported.

model = sparsemae.runtime.load("model.safetensors", threads=2)
logits = model(images)                      # float32 [B, 3, H, W], preprocessed
best = model.predict(["photo.jpg"], top_k=5)
"""

from sparsemae.predictor import Prediction
from sparsemae.runtime.model import Model, load

__all__ = ["Model", "Prediction", "load"]
