"""`sparsemae.load`: any trained model by its path. Packed files run without torch."""

from pathlib import Path

from sparsemae.packing.format import is_packed
from sparsemae.predictor import Predictor


def load(path: str | Path) -> Predictor:
    """Open a trained model: a packed file (torch is not imported), a run folder, or its model.safetensors.

    `sparsemae.runtime.load` has more settings for packed files.

    Raises:
        ValueError: there is no usable model (one line, naming it).
        OSError: the file cannot be opened.
    """
    if is_packed(path):
        from sparsemae.runtime import load as load_packed

        return load_packed(path)
    from sparsemae.tasks.loading import TorchPredictor, load_model

    return TorchPredictor(*load_model(path))
