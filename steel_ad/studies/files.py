"""Small files of a working directory, written to a temporary name and renamed; of several processes the first one writes."""

import contextlib
import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steel_ad import parallel
from steel_ad.errors import InputError


def write_text(path: Path, text: str) -> None:
    """Writes or replaces a file, whole or not at all; what UTF-8 has not, such as parts of a Latin-1 file name, as escapes.

    Raises:
      InputError: the folder is not writable or the disk is full.
    """
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_bytes(path: Path, data: bytes) -> None:
    """`write_text` of bytes."""
    if not parallel.is_main():
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        reason = error.strerror or str(error)
        raise InputError(
            f"{path} cannot be written ({reason}): free some space or choose another place", status=1
        ) from None


def write_json(path: Path, value: Any) -> None:
    """JSON with NaN and infinities as null; raises as `write_text`."""
    write_text(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """What `write_json` wrote.

    Raises:
      InputError: no such file, or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}): restore it or use a new --workdir") from None


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> None:
    """One line a row below a header, `columns` or else the first row's keys; raises as `write_text`."""
    text = io.StringIO()
    if columns or rows:
        writer = csv.DictWriter(text, columns or list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    write_text(path, text.getvalue())


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
