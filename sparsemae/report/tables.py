"""Tables of the page: what was taken for what, figures of each class, layers, settings."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparsemae.report.markup import details, escaped, table

MATRIX_CLASSES = 40
"""Beyond so many classes, the most confused pairs stand for the matrix, and the weakest classes for all."""
NUMBERED_CLASSES = 16
"""Up to so many, the matrix has its counts in writing."""
ROWS = 16


class ClassFigures(NamedTuple):
    """Of each class ``[C]``, as fractions; nan where nothing was to be counted."""

    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    f1: NDArray[np.float64]
    iou: NDArray[np.float64]
    support: NDArray[np.int64]


def class_figures(confusion: NDArray[np.int64]) -> ClassFigures:
    """Of counts ``[C, C]``: rows are the truth, columns the prediction."""
    right, truth, predicted = np.diagonal(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    with np.errstate(invalid="ignore"):
        return ClassFigures(
            right / predicted,
            right / truth,
            2 * right / (truth + predicted),
            right / (truth + predicted - right),
            truth,
        )


def confusion_table(confusion: NDArray[np.int64], names: Sequence[str], unit: str) -> str:
    """The matrix, shaded by row; of many classes the most confused pairs."""
    truth = confusion.sum(axis=1)
    if len(names) > MATRIX_CLASSES:
        off = confusion.copy()
        np.fill_diagonal(off, 0)
        order = np.argsort(-off, axis=None, kind="stable")[:ROWS]
        pairs = [divmod(int(cell), len(names)) for cell in order if off.flat[cell]]
        rows = [
            (escaped(names[i]), escaped(names[j]), f"{off[i, j]:,}", f"{off[i, j] / truth[i]:.1%}") for i, j in pairs
        ]
        return table(("labeled", "predicted", unit, "of the label's"), rows, 2)
    written = len(names) <= NUMBERED_CLASSES
    head = "".join(f"<th><span>{escaped(name)}</span></th>" for name in names)
    lines = [f"<tr><th class=corner>labeled&nbsp;↓<br>predicted&nbsp;→</th>{head}</tr>"]
    for i, name in enumerate(names):
        cells = []
        for j, count in enumerate(confusion[i].tolist()):
            share = count / truth[i] if truth[i] else 0.0
            kind = ("hit" if i == j else "miss") + " full" * bool(share > 0.55)
            said = f"{escaped(name)} → {escaped(names[j])}: {count:,} ({share:.0%})"
            cell = f"{share:.1%}" if unit == "pixels" else f"{count:,}"
            shown, style = cell if written and count else "", f'class="{kind}" style="--a:{share:.3f}" title="{said}"'
            cells.append(f"<td {style}>{shown}</td>" if count else "<td></td>")
        lines.append(f"<tr><th>{escaped(name)}</th>{''.join(cells)}</tr>")
    small = "" if written else " dense"
    return f'<div class=scroll><table class="matrix{small}">{"".join(lines)}</table></div>'


def class_table(
    confusion: NDArray[np.int64], names: Sequence[str], unit: str, palette: Sequence[Sequence[int]] | None
) -> str:
    """Precision, recall, F1 (of pixels IoU) and support; of many classes the weakest, and all folded away."""
    found = class_figures(confusion)
    kinds = {"precision": found.precision, "recall": found.recall}
    kinds |= {"IoU": found.iou} if unit == "pixels" else {"F1": found.f1}
    last = list(kinds.values())[-1]

    def row(i: int) -> list[str]:
        chip = f'<i class=chip style="background:rgb({",".join(map(str, palette[i]))})"></i>' if palette else ""
        bar = "" if np.isnan(last[i]) else f'<i class=bar style="--a:{last[i]:.3f}"></i>'
        *cells, final = ("–" if np.isnan(values[i]) else f"{values[i]:.1%}" for values in kinds.values())
        return [chip + escaped(names[i]), *cells, bar + final, f"{found.support[i]:,}"]

    head = ("class", *kinds, "support")
    if len(names) <= MATRIX_CLASSES:
        return table(head, map(row, range(len(names))))
    weakest = np.argsort(np.nan_to_num(last, nan=np.inf), kind="stable")[:ROWS]
    return table(head, (row(int(i)) for i in weakest)) + details(
        f"All {len(names):,} classes", table(head, map(row, range(len(names))))
    )


def layer_table(layers: Mapping[str, Any]) -> str:
    """What is sparse, and what stays dense."""
    sparse, dense = layers["sparse"], layers["dense"]
    kept, total = (sum(layer[i] for layer in sparse) for i in (2, 3))
    rest = sum(count for _, count in dense)
    rows = [(escaped(name), escaped(pattern), f"{own:,}", f"{all_:,}") for name, pattern, own, all_ in sparse]
    rows += [("<b>sparse weights</b>", "", f"<b>{kept:,}</b>", f"<b>{total:,}</b>")] if sparse else []
    rows += [(escaped(name), "dense", f"{count:,}", f"{count:,}") for name, count in dense]
    rows.append(("<b>all parameters</b>", "", f"<b>{kept + rest:,}</b>", f"<b>{total + rest:,}</b>"))
    return table(("layer", "pattern", "kept", "of"), rows, 2)


def settings_table(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """A row per key, a column per run; of several runs only the rows that differ."""
    rows = []
    for key in dict.fromkeys(key for values in columns.values() for key in values):
        cells = [str(values.get(key, "")) for values in columns.values()]
        if len(columns) == 1 or len(set(cells)) > 1:
            rows.append([escaped(cell) for cell in (key, *cells)])
    head = ["setting", *map(escaped, columns)] if len(columns) > 1 else ["setting", "value"]
    return table(head, rows, len(head)) if rows else ""
