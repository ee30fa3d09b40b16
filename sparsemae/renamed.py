"""What had another name in an earlier version: read from old files for good, answered with the new name when typed."""

from collections.abc import Mapping
from typing import Any

OPTIONS = {
    "taps": "out_indices",
    "masks": "data",
    "unlabelled": "task pretrain",
    "data.eval_crop": "data.crop_pct",
    "data.crop_max_share": "data.cat_max_ratio",
}
"""Dotted names in recipes and in the configurations of runs, and words of the command line."""
CARD = {
    "model.name": "architecture",
    "model.args": "model_args",
    "model.drop_path": None,
    "sparse": "patterns",
    "input.eval_crop": "input.crop_pct",
    "taps": "settings.out_indices",
    **{
        name: f"settings.{name}"
        for name in ("decoder", "mask_ratio", "norm_pix_loss", "head", "inference", "palette", "reduce_zero_label")
    },
}
"""What a weights file of version 1 says of its model; None: no longer kept."""
CHECKPOINT = {"booked": "logged_through"}
"""Counters in a checkpoint of version 1."""


def renamed(tree: Mapping[str, Any], table: Mapping[str, str | None]) -> dict[str, Any]:
    """A copy of nested settings under the names of now."""
    result: dict[str, Any] = {}
    _move(tree, table, "", result)
    return result


def _move(tree: Mapping[str, Any], table: Mapping[str, str | None], prefix: str, result: dict[str, Any]) -> None:
    for key, value in tree.items():
        name = table.get(prefix + key, prefix + key)
        if isinstance(value, Mapping) and any(old.startswith(f"{prefix}{key}.") for old in table):
            _move(value, table, f"{prefix}{key}.", result)
        elif name is not None:
            *branches, leaf = name.split(".")
            branch = result
            for part in branches:
                branch = branch.setdefault(part, {})
            branch[leaf] = value


def new_option(word: str) -> str | None:
    """The name of now of an option that had another one; None if it had not."""
    for old, new in OPTIONS.items():
        if word == old or word.startswith(f"{old}."):
            return new + word[len(old) :]
    return None
