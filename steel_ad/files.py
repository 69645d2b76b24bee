"""Small files of a working directory, written to a temporary name and renamed; of several processes the first one writes."""

import contextlib
import csv
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    """Makes one sentence of a ValueError or KeyError; for a few lines that parse or `check` a file's content, and no more.

    Raises:
      InputError: the content is damaged.
    """
    try:
        yield
    except (ValueError, KeyError, csv.Error) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is damaged ({type(error).__name__}: {reason[:200]}): {mend}") from None


NUMBER = (int, float)


def check(value: Any, form: Any, name: str = "the file") -> None:
    """Looks whether a JSON value has the form that code relies on.

    Args:
      form: a type, None, or a tuple of forms of which one must fit; `[form]` for a list of any length; `{str: form}` for a dict with
        any keys; `{"key": form, "other?": form}` for a dict that has `key`, and may have `other` and further keys.
      name: of the value, for the sentence.

    Raises:
      ValueError: it has another form.
    """
    if isinstance(form, tuple):
        for one in form:
            with contextlib.suppress(ValueError):
                return check(value, one, name)
        raise ValueError(f"{name} is {_shown(value)}")
    if isinstance(form, dict):
        check(value, dict, name)
        for key, of in form.items():
            if key is str:
                for k, v in value.items():
                    check(v, of, k)
            elif key.rstrip("?") in value:
                check(value[key.rstrip("?")], of, key.rstrip("?"))
            elif not key.endswith("?"):
                raise ValueError(f"{name} has no {key}")
    elif isinstance(form, list):
        check(value, list, name)
        for item in value:
            check(item, form[0], name)
    elif form is None:
        if value is not None:
            raise ValueError(f"{name} is {_shown(value)}")
    # True is an int in Python, and a larger int is no float.
    elif not isinstance(value, form) or (isinstance(value, bool) and form in NUMBER):
        raise ValueError(f"{name} is {_shown(value)}")
    elif isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError(f"{name} is too large")


def _shown(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}" if isinstance(value, dict | list) else repr(value)


def read_csv(path: Path, columns: Iterable[str] = ()) -> list[dict[str, str]]:
    """The rows that `write_csv` wrote, as text.

    Raises:
      ValueError or csv.Error: a row lacks a cell, has one too many, or lacks one of the columns.
    """
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if any(None in row or None in row.values() or not set(columns) <= set(row) for row in rows):
        raise ValueError("a row lacks a cell or has one too many")
    return rows


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
