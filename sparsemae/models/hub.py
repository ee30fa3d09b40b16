"""The hub (huggingface.co, or HF_ENDPOINT): weights from it or from its cache, and folders pushed to it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import timm
from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from timm.models import is_model_in_modules
from timm.models.vision_transformer import VisionTransformer

FILES = ("model.safetensors", "pytorch_model.bin")
SECONDS = 10
MODULES = ("vision_transformer", "deit")
"""Files of timm whose models are VisionTransformers."""


def timm_name(source: str) -> str:
    """The name behind ``timm:``. Raises ValueError unless timm has weights of a VisionTransformer under it."""
    name = source.removeprefix("timm:")
    if not timm.is_model(name):
        raise ValueError(f"{source}: wanted a timm model after timm:, got {name!r}")
    if not is_model_in_modules(name, MODULES):
        raise ValueError(
            f"{source}: wanted a timm VisionTransformer, got another network: its forward has what a VisionTransformer "
            "lacks (rotary or relative position embeddings in EVA, BEiT and DINOv3)"
        )
    return name


def pretrained(source: str, option: str = "--init") -> VisionTransformer:
    """The model of ``timm:NAME``. Raises ValueError, naming option and way out, if its weights cannot be had."""
    name = timm_name(source)
    found = timm.get_pretrained_cfg(name)
    if found is None or not found.has_weights:
        raise ValueError(f"{option} {source}: wanted the name of weights, got one that timm has none for")
    repository, files = found.hf_hub_id, [found.hf_hub_filename] if found.hf_hub_filename else FILES
    with _fetching(f"{option} {source}"):
        if repository:
            _ask_once(repository, files)
        model: VisionTransformer = timm.create_model(name, pretrained=True)
    return model


def fetched(source: str) -> str:
    """The file of weights in ``hf-hub:OWNER/NAME`` or ``hf-hub:OWNER/NAME@REVISION``; another source as it is.

    Raises ValueError, naming the way out, if it cannot be had.
    """
    if not source.startswith("hf-hub:"):
        return source
    repository, _, revision = source.removeprefix("hf-hub:").partition("@")
    with _fetching(f"--init {source}"):
        _ask_once(repository, FILES, revision or None)
        for file in FILES:
            try:
                return hf_hub_download(repository, file, revision=revision or None)
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                continue
    raise ValueError(f"--init {source}: wanted a repository with {' or '.join(FILES)}, got one with neither")


def file_beside(source: str, weights: Path, name: str) -> Path | None:
    """A file of that name beside somebody's weights, from the hub where they are; None: there is none to be had."""
    file = weights.parent / name
    if source.startswith("hf-hub:") and not file.is_file():
        repository, _, revision = source.removeprefix("hf-hub:").partition("@")
        with suppress(Exception):  # the client's own; the weights are there, with or without it
            _ask_once(repository, [name], revision or None)
            file = Path(hf_hub_download(repository, name, revision=revision or None))
    return file if file.is_file() else None


def push(folder: Path, repository: str) -> str:
    """Upload a folder as one commit; returns its address. Raises ValueError if it is not there as a whole."""
    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload by sparsemae"))
    except Exception as error:  # the client's own, of whatever library it is built on
        reason = f"{error}" or type(error).__name__
        raise ValueError(f"push: {repository}: no commit was confirmed by {api.endpoint}: {reason}") from error


@contextmanager
def _fetching(source: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the client's own, of whatever library it is built on, and damaged files
        raise ValueError(
            f"{source}: its weights cannot be fetched from the hub: {error or type(error).__name__} (wanted a "
            "connection, HF_ENDPOINT of a mirror, HF_HOME of a filled cache, the file itself (--init FILE), or a "
            "pretraining of your own images)"
        ) from error


def _ask_once(repository: str, files: Sequence[str], revision: str | None = None) -> None:
    """Raises what the client raises if nothing is in its cache and the hub does not answer.

    What it answers does not matter here. The hub's client would try to connect for 50 s.
    """
    if not any(isinstance(try_to_load_from_cache(repository, file), str) for file in files):
        with suppress(HfHubHTTPError):
            get_hf_file_metadata(hf_hub_url(repository, files[0], revision=revision), timeout=SECONDS)
