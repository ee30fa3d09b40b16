"""How the settings of two runs differ."""

from collections.abc import Collection, Mapping
from typing import Any

from sparsemae.limits import flatten


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any], may_change: Collection[str]
) -> list[str]:
    """Settings that differ and must not, as ``name was X, is Y``.

    A setting that ``before`` does not know, because it was made by an older version, counts as its default; one that
    ``now`` does not know was an older version's, which no longer matters.
    """
    defaults, old, new = flatten_config(defaults), flatten_config(before), flatten_config(now)
    old = {key: value for key, value in defaults.items() if key in new} | old
    return [
        f"{key} was {old.get(key)}, is {new.get(key)}"
        for key in sorted(old | new)
        if key not in may_change and old.get(key) != new.get(key)
    ]


def flatten_config(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A tree of settings as one dictionary, names joined by dots."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in flatten(tree).items()}
