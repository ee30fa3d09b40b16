"""Pretrained weights of timm, fetched from the hub (huggingface.co), or taken from its cache."""

from contextlib import suppress

import timm
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from timm.models.vision_transformer import VisionTransformer

from sparsemae.models.architecture import timm_name

FILES = ("model.safetensors", "pytorch_model.bin")
SECONDS = 10


def pretrained(source: str, option: str = "--init") -> VisionTransformer:
    """The model of ``timm:NAME``. Raises ValueError, naming option and way out, if its weights cannot be had."""
    name = timm_name(source)
    found = timm.get_pretrained_cfg(name)
    if found is None or not found.has_weights:
        raise ValueError(f"{option} {source}: wanted the name of weights, got one that timm has none for")
    repository, files = found.hf_hub_id, [found.hf_hub_filename] if found.hf_hub_filename else FILES
    try:
        if repository and not any(isinstance(try_to_load_from_cache(repository, file), str) for file in files):
            _ask_once(repository, files[0])  # the hub's client would try to connect for 50 s
        model: VisionTransformer = timm.create_model(name, pretrained=True)
    except Exception as error:  # the client's own, of whatever library it is built on, and damaged files
        raise ValueError(
            f"{option} {source}: its weights cannot be fetched from the hub: {error or type(error).__name__} (wanted a "
            "connection, HF_ENDPOINT of a mirror, HF_HOME of a filled cache, or the file itself: --init FILE)"
        ) from error
    return model


def _ask_once(repository: str, file: str) -> None:
    """Raises what the client raises if the hub does not answer; what it answers does not matter here."""
    with suppress(HfHubHTTPError):
        get_hf_file_metadata(hf_hub_url(repository, file), timeout=SECONDS)
