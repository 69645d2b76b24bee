"""Networks as flax.linen modules: pure functions of (variables, x)."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from steel_ad import named

# A network is a module here and a line, or a user's own, `module:Class`.
AUTOENCODERS = {"bergmann": "steel_ad.models.autoencoder:Autoencoder"}
SEGMENTERS = {"unet": "steel_ad.models.unet:UNet", "compact_cnn": "steel_ad.models.compact_cnn:Segmenter"}


def build(registry: dict[str, str], config: Any) -> nn.Module:
    """The network `config.model`: its fields take the settings of the same names.

    Raises:
      InputError: there is none of that name.
    """
    kind = named.find(config.model, registry, "model", "--config.model")
    given = {f.name: getattr(config, f.name) for f in dataclasses.fields(kind) if hasattr(config, f.name)}
    if "dtype" in given:
        given["dtype"] = jnp.dtype(config.dtype)
    return kind(**given)
