"""Tables of results as text: aligned for a terminal, or in Markdown."""

import math
from collections.abc import Mapping, Sequence
from typing import Any


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Plain text, aligned: a header, a rule and one line a row, without a final line break.

    Args:
        rows: one mapping a row. Floats (of numpy and jax too) get four significant digits; a missing key, None and NaN
            become "-".
        columns: the keys to show, in order; also the headers. A column of numbers is set to the right.
    """
    cells = [list(columns), *_cells(rows, columns)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    cells.insert(1, ["-" * width for width in widths])
    numeric = [_numeric(rows, column) for column in columns]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in cells
    )


def markdown(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """The same table in Markdown, without a final line break; "|" in a cell is escaped. Arguments as in `table`."""
    rule = ["--:" if _numeric(rows, column) else ":--" for column in columns]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in [list(columns), *_cells(rows, columns)]]
    return "\n".join(f"| {' | '.join(line)} |" for line in [escaped[0], rule, *escaped[1:]])


_METRICS = (
    *("map", "pixel_auroc", "aupro_30", "pixel_ap", "aupimo", "image_auroc", "image_accuracy"),
    *("image_accuracy_calibrated", "image_tpr", "image_tnr", "found", "found_fpr_05"),
    *("false_regions_per_image", "false_regions_per_good_image"),
)


def metrics(maps: Mapping[str, Mapping[str, Any]]) -> str:
    """`table` of the chief metrics, one row a map; `maps` as in `metrics.json`, "found" is `defects_found` at IoU > 0."""
    rows = [{"map": name, **m, "found": m.get("defects_found", {}).get("iou_0")} for name, m in maps.items()]
    return table(rows, _METRICS)


def _cells(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[list[str]]:
    return [[_text(_scalar(row.get(column))) for column in columns] for row in rows]


def _scalar(value: Any) -> Any:
    """A Python scalar for a numpy or jax one; NaN is None."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and math.isnan(value) else value


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:#.4g}".removesuffix(".")
    return " ".join(str(value).split())


def _numeric(rows: Sequence[Mapping[str, Any]], column: str) -> bool:
    values = [value for row in rows if (value := _scalar(row.get(column))) is not None]
    return bool(values) and all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
