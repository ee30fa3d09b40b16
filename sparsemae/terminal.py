"""What reaches a terminal: text of names, files and foreign messages is shown, and never acts on it."""

import os
import sys
import unicodedata
import warnings
from io import TextIOWrapper
from typing import Any


def printable(text: object) -> str:
    """One line that may be shown: line breaks, control and direction characters, and lone surrogates are escaped."""
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char) in _ACTING else char for char in str(text)
    )


_ACTING = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def make_safe() -> None:
    """Escape what an output's encoding lacks, where Python would stop, and give warnings one line each.

    An output that was closed before Python began is nowhere.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        if isinstance(stream := getattr(sys, name), TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    warnings.formatwarning = _one_line
    warnings.filterwarnings("ignore", "Image size .* exceeds limit")  # Pillow's; ours names the file


def _one_line(message: Warning | str, *_: Any, **__: Any) -> str:
    return f"warning: {printable(' '.join(str(message).split()))}\n"
