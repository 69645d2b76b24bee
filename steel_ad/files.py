"""Small files of a working directory, written to a temporary name and renamed; of several processes the first one writes."""

import contextlib
import csv
import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
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
    # Always the same, so that what a killed process left is written over and renamed.
    temporary = path.with_name(f".{path.name}.tmp")
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


def read_json(path: Path, kind: type | tuple[type, ...] = (dict, list)) -> Any:
    """What `write_json` wrote, of one of these types.

    Raises:
      InputError: no such file, damaged, or something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
        if not isinstance(value, kind):
            raise ValueError(f"it holds {type(value).__name__}")
    except RecursionError:
        raise InputError(
            f"{path} cannot be read (it is nested too deeply): restore it or use a new --workdir"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}): restore it or use a new --workdir") from None
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


@contextlib.contextmanager
def understood(path: Path, mend: str) -> Iterator[None]:
    """Makes one sentence of what code raises that reads a damaged file's content: wrong types, missing keys, odd values.

    Raises:
      InputError: the content is damaged.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, csv.Error) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is damaged ({type(error).__name__}: {reason[:200]}): {mend}") from None


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
