"""Things by name: an entry of a registry, or a user's own as `module:attribute`."""

import importlib
from collections.abc import Mapping
from typing import Any

from steel_ad.errors import InputError


def find(name: str, registry: Mapping[str, Any], what: str, flag: str) -> Any:
    """The entry of that name; an entry that is text names a `module:attribute` itself, which is imported now.

    Args:
      what: noun for the sentences, such as "loss".
      flag: that the name came from, such as "--config.loss".

    Raises:
      InputError: no such entry, module or attribute.
    """
    if name not in registry and ":" not in name:
        own = f"your own {what} as module:NAME"
        raise InputError(f"{flag}={name}: there is no {what} {name!r}: use one of {', '.join(registry)}, or {own}")
    entry = registry.get(name, name)
    if not isinstance(entry, str):
        return entry
    module, _, attribute = entry.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a user's module raises anything while it is imported
        raise InputError(
            f"{flag}={name} cannot be loaded ({type(error).__name__}: {error}): give module:NAME as Python imports it"
        ) from None
