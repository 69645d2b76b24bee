"""Recipes: files of presets of an experiment's settings, which --config names as PRESET or FILE.py:PRESET."""

import ast
import dataclasses
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steel_ad.errors import InputError
from steel_ad.fields import Settings


def folder(name: str) -> Path:
    """Where `experiments` or `configs` is: in the installed package, or beside the package in a clone."""
    package = Path(__file__).parent
    return package / name if (package / name).is_dir() else package.parent / name


def place(text: str, builtin: str) -> tuple[Path, str]:
    """File and preset, which may be "", of a --config such as quick, my.py or my.py:quick; `builtin` is the recipe of the first."""
    file, _, preset = (text, "", "") if text.endswith(".py") else text.rpartition(":")
    return Path(file) if file else folder("configs") / f"{builtin}.py", preset


def load(text: str, builtin: str) -> dict[str, Any]:
    """The settings that a --config names; arguments as `place`.

    Raises:
      InputError: no such file or preset, or whatever a file of the user's own raises.
    """
    path, preset = place(text, builtin)
    if not path.is_file():
        raise InputError(f"--config={text}: there is no file {path}: give a PRESET, or FILE.py:PRESET of your own")
    try:
        make = runpy.run_path(str(path))["get_config"]
        made = make(preset) if preset else make()
        return made.to_dict() if hasattr(made, "to_dict") else dict(made)
    except InputError:
        raise
    except Exception as error:  # whatever a user's file raises
        raise InputError(
            f"--config={text} cannot be loaded ({type(error).__name__}: {error}): {path} needs a function get_config(preset)"
        ) from None


def presets(builtin: str) -> dict[str, dict[str, Any]]:
    """Preset -> what it sets, of a recipe of the project."""
    return runpy.run_path(str(folder("configs") / f"{builtin}.py"))["PRESETS"]


def table(path: Path) -> str:
    """The table of presets in a recipe's docstring, or ""."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return "".join(text.partition("\npreset ")[1:]).strip()


def of(kind: type[Settings], known: Mapping[str, Mapping[str, Any]], preset: str) -> Any:
    """A preset's settings as a ConfigDict, which a recipe of one's own may change field by field.

    Raises:
      InputError: no such preset.
    """
    from ml_collections import ConfigDict

    if preset not in known:
        raise InputError(f"there is no preset {preset!r}: use one of {', '.join(known)}, or FILE.py:PRESET of your own")
    config = ConfigDict(dataclasses.asdict(kind(**known[preset]))).lock()
    if "loss_options" in config:
        config.loss_options.unlock()
    return config
