"""What --help prints, and the sentence about a flag that does not exist."""

import difflib
import re
import shlex
import shutil
import sys
import textwrap
import typing
from collections.abc import Sequence
from typing import Any, Literal, Protocol

from absl import flags

from steel_ad import fields, recipes

FLAGS = flags.FLAGS
_HOW = ("compilation_cache", "native", "coordinator", "num_processes", "process_id")


class Group(Protocol):
    """Settings that are flags, as `cli.Flags`."""

    title: str
    recipe: str
    names: dict[str, str]
    fields: list[fields.Field]

    def base(self) -> dict[str, Any]: ...


def text(groups: Sequence[Group], program: Sequence[str]) -> str:
    """What the binary does, and its flags with their values.

    Args:
      program: what was typed before the flags, where it was not the module.

    Raises:
      InputError: the recipe that the command line names cannot be loaded.
    """
    what = sys.modules["__main__"].__doc__ or ""
    parts = [re.sub(r"python -m experiments\.\w+", shlex.join(program), what) if program else what]
    own, common = _names()
    settings = {"config", *(name for group in groups for name in group.names.values())}

    def list_plain(title: str, names: Sequence[str]) -> None:
        entries = [_entry(n, FLAGS[n].default, FLAGS[n].help) for n in names if n not in settings]
        parts.extend([title, *entries, ""] if entries else [])

    list_plain("flags, with their defaults in brackets:", own)
    for group in groups:
        title, values = group.title, group.base()
        if group.recipe:
            path, _ = recipes.place(FLAGS.config, group.recipe)
            parts += [_entry("config", FLAGS.config, FLAGS["config"].help), "", recipes.table(path), ""]
            title += f", with those of --config={FLAGS.config} in brackets"
        entries = [_entry(group.names[f.name], values.get(f.name, f.default), f.help, f.type) for f in group.fields]
        parts += [f"{title}:", *entries, ""]
    list_plain("flags of how it runs:", common)
    return "\n".join(parts).rstrip()


def unknown(name: str) -> str:
    """The sentence about a flag of that name, which does not exist."""
    prefix = "config." if name.startswith("config.") and "config" in FLAGS else ""
    names = [n for part in _names() for n in part]
    known = [n.removeprefix(prefix) for n in names if (n.startswith(prefix) if prefix else "." not in n)]
    close = difflib.get_close_matches(name.removeprefix(prefix), known, 1)
    meant = f" (did you mean --{prefix}{close[0]}?)" if close else ""
    kind = "setting" if prefix else "flag"
    return f"there is no {kind} --{name}{meant}: the {kind}s are {', '.join(known)}"


def _names() -> tuple[list[str], list[str]]:
    """Flags of what the binary does, and of how it runs, in the order in which they were defined."""
    known = FLAGS.flags_by_module_dict()
    names = [flag.name for module in (sys.argv[0], "steel_ad.cli") for flag in known.get(module, [])]
    return [n for n in names if n not in _HOW], [n for n in names if n in _HOW]


def _entry(name: str, value: Any, what: str, kind: Any = str) -> str:
    """The lines about one flag."""
    if kind is bool or isinstance(value, bool):
        name = f"[no]{name}"
    shown = fields.said(value, kind)
    if typing.get_origin(kind) is Literal:
        what += f" One of {', '.join(typing.get_args(kind))}."
    line = f"--{name}{f' ({shown})' if shown else ''}: {what}"
    width = min(120, shutil.get_terminal_size((120, 24)).columns)
    return textwrap.fill(line, width, initial_indent="  ", subsequent_indent="      ", break_on_hyphens=False)
