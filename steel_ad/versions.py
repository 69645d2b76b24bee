"""Versions of what the numbers of a run depend on."""

import platform
from importlib import metadata

import jax

from steel_ad import native


def versions() -> dict[str, str]:
    """Python, devices, the forms of the compiled operations, and the packages that compute."""
    packages = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
    return {
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "devices": str(jax.device_count()),
        "processes": str(jax.process_count()),
        **native.forms(),
        **packages,
    }
