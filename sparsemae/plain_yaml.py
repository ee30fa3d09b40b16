"""YAML of plain values, in recipes and run folders that anybody may have written.

The safe loader makes no Python objects, but an alias may stand for a list of aliases: ten lines of them unfold to more
than any memory, whoever walks through the values. So they are counted as they would unfold before anything is made.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from sparsemae.files import existing

MOST_BYTES = 1 << 18
MOST_VALUES = 100_000


def read_yaml(path: Path) -> Any:
    """What a YAML file says.

    Raises:
        ValueError: it is no file, no YAML, too large, or not of plain values; one line that names it.
        OSError: it cannot be read.
    """
    with existing(path).open("rb") as stream:
        content = stream.read(MOST_BYTES + 1)
    try:
        if len(content) > MOST_BYTES:
            raise ValueError(f"wanted at most {MOST_BYTES:,} bytes, got more")
        loader = yaml.SafeLoader(content)
        node = loader.get_single_node()
        if _unfolded(node, {}) > MOST_VALUES:
            raise ValueError(f"wanted at most {MOST_VALUES:,} values, got aliases that unfold to more")
        return None if node is None else loader.construct_document(node)
    except Exception as error:  # on odd numbers, dates and keys PyYAML raises what comes
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: wanted a YAML file of plain values: {said:.300}") from error


def read_mapping(path: Path) -> dict[str, Any]:
    """Names and values of a YAML file, which JSON is, too. Raises as `read_yaml`, and ValueError on anything else."""
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: wanted names and values, got {type(values).__name__}")
    return values


def _unfolded(node: Any, known: dict[int, int]) -> int:
    """Values in a node, each alias counted as what it stands for; one that holds itself has too many."""
    if id(node) not in known:
        known[id(node)] = MOST_VALUES + 1
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        keys = [key for key, _ in parts] if isinstance(node, yaml.MappingNode) else []
        names = Counter((key.tag, key.value) for key in keys if isinstance(key, yaml.ScalarNode))
        for (_, name), times in names.most_common(1):
            if times > 1:  # PyYAML takes the last
                raise ValueError(f"wanted each name once, got {name!r:.60} {times} times")
        inner = [part for entry in parts for part in (entry if isinstance(entry, tuple) else (entry,))]
        known[id(node)] = 1 + sum(_unfolded(part, known) for part in inner)
    return known[id(node)]
