"""Settings as frozen dataclasses whose fields are flags: a field's type, its default, and its comment, which is the help.

A new setting is one field. Its comment, on the same line or right above it, begins with a noun.
"""

import ast
import dataclasses
import functools
import inspect
import itertools
import sys
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from steel_ad.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of any kind; each value is checked against its field's type."""

    flag: ClassVar[str] = "--"  # what stands before a field's name on the command line

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            self._must(is_a(getattr(self, f.name), f.type), f.name, called(f.type))

    def _must(self, holds: bool, name: str, what: str) -> None:
        if not holds:
            raise InputError(f"{self.flag}{name}={said(getattr(self, name))[:100]} must be {what}")

    def _must_be_at_least(self, least: int, *names: str) -> None:
        for name in names:
            self._must(getattr(self, name) >= least, name, f"at least {least}")


class Field(NamedTuple):
    """A setting as a flag; `default` is `dataclasses.MISSING` where it has to be given."""

    name: str
    type: Any
    default: Any
    help: str


def fields(kind: type[Settings]) -> tuple[Field, ...]:
    """The settings of a dataclass; the help is the comment of its field, or of the field that it replaces."""
    helps: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        helps |= _comments(sys.modules[base.__module__])[base.__name__]
    return tuple(
        Field(
            f.name,
            f.type,
            f.default if f.default_factory is dataclasses.MISSING else f.default_factory(),
            helps.get(f.name, ""),
        )
        for f in dataclasses.fields(kind)
    )


@functools.cache
def _comments(module: types.ModuleType) -> dict[str, dict[str, str]]:
    """Class -> field -> the comment on its last line, or else the comment lines right above it."""
    lines = inspect.getsource(module).splitlines()

    def comment(node: ast.AnnAssign) -> str:
        last = lines[(node.end_lineno or 0) - 1][node.end_col_offset or 0 :].strip()
        above = itertools.takewhile(lambda line: line.startswith("#"), map(str.strip, lines[node.lineno - 2 :: -1]))
        return " ".join(line.lstrip("# ") for line in ([last] if last else reversed(list(above))))

    return {
        part.name: {
            node.target.id: text
            for node in part.body
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and (text := comment(node))
        }
        for part in ast.parse("\n".join(lines)).body
        if isinstance(part, ast.ClassDef)
    }


def _optional(kind: Any) -> tuple[Any, str]:
    """A field's type without None, and the word for None, "" where it must not be None."""
    kind, word = typing.get_args(kind)[:2] if typing.get_origin(kind) is Annotated else (kind, "none")
    if typing.get_origin(kind) is not types.UnionType:
        return kind, ""
    return next(k for k in typing.get_args(kind) if k is not types.NoneType), word


def is_a(value: Any, kind: Any) -> bool:
    """Whether a value is of a field's type, numbers finite."""
    kind, word = _optional(kind)
    if value is None:
        return word != ""
    if kind in (int, float):
        if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
            return False
        return abs(value) < 2**32 if kind is int else abs(value) <= sys.float_info.max
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(is_a(v, typing.get_args(kind)[0]) for v in value)
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    return isinstance(value, typing.get_origin(kind) or kind)


def called(kind: Any) -> str:
    """What a person calls a field's type."""
    kind, word = _optional(kind)
    if typing.get_origin(kind) is tuple:
        return f"a list, each of it {called(typing.get_args(kind)[0])}"
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(typing.get_args(kind))}"
    known = {int: "a whole number below 2**32", float: "a finite number", bool: "true or false", str: "text"}
    return (f"{word} or " if word else "") + known.get(kind, "names and values")


def read(text: str, kind: Any) -> Any:
    """The value of a field's type that a text says; the text itself where it says none, which the settings refuse."""
    kind, word = _optional(kind)
    if word and text == word:
        return None
    if typing.get_origin(kind) is tuple:
        parts = (part.strip(" '\"()[]") for part in text.split(","))
        return tuple(read(part, typing.get_args(kind)[0]) for part in parts if part)
    try:
        if kind is bool:
            return {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}[text.lower()]
        return kind(text) if kind in (int, float) else text
    except (ValueError, KeyError):
        return text


def said(value: Any, kind: Any = str) -> str:
    """The text of a value, which `read` understands; "" where there is none."""
    if value is None or value is dataclasses.MISSING:
        return _optional(kind)[1] if value is None else ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return ",".join(f"{k}={said(v)}" for k, v in value.items())
    return ",".join(map(said, value)) if isinstance(value, list | tuple) else str(value)
