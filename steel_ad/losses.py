"""Losses: name -> pure function, of reconstructions (SPEC section 4) and of segmentations (SPEC section 2).

A loss takes reconstruction and target `[b, h, w, c]`, floating, in [0, 1] (a segmentation's: logits and mask), and its own keyword
options, and returns `[b]`, one number a patch. A new one is a function here and a line in its registry, or anybody's function
named `module:function`.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import Array

from steel_ad.errors import InputError
from steel_ad.ops.ssim import mean_residual


def l2(reconstruction: Array, target: Array) -> Array:
    """Mean squared difference, `[b]`."""
    return jnp.mean(jnp.square(reconstruction - target), axis=(1, 2, 3))


def l1(reconstruction: Array, target: Array) -> Array:
    """Mean absolute difference, `[b]`."""
    return jnp.mean(jnp.abs(reconstruction - target), axis=(1, 2, 3))


def ssim(reconstruction: Array, target: Array, **options) -> Array:
    """Mean of 1 - SSIM, `[b]`; options as `ops.ssim.ssim_map`'s."""
    return jax.vmap(lambda x, y: mean_residual(x, y, **options))(reconstruction, target)


_PARAMETERS = inspect.signature(mean_residual).parameters.values()
ssim.options = tuple(p.name for p in _PARAMETERS if p.kind is p.KEYWORD_ONLY)  # type: ignore[attr-defined]


def ssim_l2(reconstruction: Array, target: Array, *, weight: float = 0.5, **options) -> Array:
    """`weight` times `ssim` plus (1 - `weight`) times `l2`, `[b]`; further options as `ssim`'s."""
    return weight * ssim(reconstruction, target, **options) + (1 - weight) * l2(reconstruction, target)


ssim_l2.options = ("weight", *ssim.options)  # type: ignore[attr-defined]

LOSSES: dict[str, Callable[..., Array]] = {"l2": l2, "l1": l1, "ssim": ssim, "ssim_l2": ssim_l2}


def _flat(x: Array) -> Array:
    return x.reshape(x.shape[0], -1)


def mse(logits: Array, target: Array) -> Array:
    """Mean squared difference of tanh(logits) and the mask, `[b]` (SPEC section 2)."""
    return l2(jnp.tanh(logits), target)


def bce(logits: Array, target: Array) -> Array:
    """Binary cross-entropy, `[b]`; without SPEC's misprint, which leaves out the minus sign."""
    return jnp.mean(_flat(jax.nn.softplus(logits) - logits * target), axis=1)


def focal(logits: Array, target: Array, *, gamma: float = 2.0, alpha: float = 0.5) -> Array:
    """Focal loss (Lin et al. 2017), `[b]`: cross-entropy weighted by (1 - p of the truth)^gamma; alpha is a defect's share."""
    p = jax.nn.sigmoid(logits)
    miss = target * (1 - p) + (1 - target) * p
    weight = 2 * (alpha * target + (1 - alpha) * (1 - target))
    # The offset keeps the power's gradient finite at miss = 0.
    return jnp.mean(_flat(weight * (miss + 1e-7) ** gamma * (jax.nn.softplus(logits) - logits * target)), axis=1)


def dice(logits: Array, target: Array, *, smooth: float = 1.0) -> Array:
    """1 - Dice coefficient of the probabilities (Milletari et al. 2016), `[b]`; `smooth` px keep an empty mask defined."""
    p, t = _flat(jax.nn.sigmoid(logits)), _flat(target)
    return 1 - (2 * jnp.sum(p * t, axis=1) + smooth) / (jnp.sum(p, axis=1) + jnp.sum(t, axis=1) + smooth)


def bce_dice(logits: Array, target: Array, *, weight: float = 0.5) -> Array:
    """`weight` times `dice` plus (1 - `weight`) times `bce`, `[b]`."""
    return weight * dice(logits, target) + (1 - weight) * bce(logits, target)


def mask_ssim(logits: Array, target: Array, **options) -> Array:
    """Mean of 1 - SSIM between the probabilities and the mask, `[b]`; options as `ssim`'s."""
    return ssim(jax.nn.sigmoid(logits), target, **options)


mask_ssim.options = ssim.options  # type: ignore[attr-defined]

# Of a segmentation: logits and mask `[b, h, w, 1]`, the mask in [0, 1] -> `[b]`.
SEGMENTATION_LOSSES: dict[str, Callable[..., Array]] = {
    "mse": mse,
    "bce": bce,
    "focal": focal,
    "dice": dice,
    "bce_dice": bce_dice,
    "ssim": mask_ssim,
}


def activation(segmentation_loss: str) -> Callable[[Array], Array]:
    """What makes the map of the logits: tanh for SPEC's "mse", else sigmoid."""
    return jnp.tanh if segmentation_loss == "mse" else jax.nn.sigmoid


def option_names(loss: Callable) -> tuple[str, ...]:
    """Names of a loss's options: its keyword arguments after reconstruction and target, or its attribute `options`."""
    if hasattr(loss, "options"):
        return tuple(loss.options)
    return tuple(list(inspect.signature(loss).parameters)[2:])


def get(
    name: str, options: Mapping[str, object] | None = None, registry: Mapping[str, Callable[..., Array]] = LOSSES
) -> Callable[[Array, Array], Array]:
    """The loss of that name with its options bound: `(reconstruction or logits, target) -> [b]`.

    Args:
      name: a key of `registry`, or `module:function` of the user's own.
      options: keyword arguments; None values are left to the loss's default.
      registry: `LOSSES` or `SEGMENTATION_LOSSES`.

    Raises:
      InputError: no such loss, module or function, or an option that the loss does not take.
    """
    if ":" in name:
        module, function = name.split(":", 1)
        try:
            loss = getattr(importlib.import_module(module), function)
        except Exception as error:  # whatever the user's module raises while it is imported
            raise InputError(
                f"--config.loss={name} cannot be loaded ({error}): give module:function as Python imports it"
            ) from None
        if not callable(loss):
            raise InputError(f"--config.loss={name} is no function: give module:function of a loss")
    elif name in registry:
        loss = registry[name]
    else:
        raise InputError(f"there is no loss {name!r}: use one of {', '.join(registry)}, or your own as module:function")
    given = {k: v for k, v in (options or {}).items() if v is not None}
    if unknown := sorted(set(given) - set(option_names(loss))):
        takes = ", ".join(option_names(loss)) or "none"
        raise InputError(
            f"the loss {name} has no option {unknown[0]!r} (it takes {takes}): leave it out of --config.loss_options"
        )
    return functools.partial(loss, **given)


def check(loss: Callable[[Array, Array], Array], name: str, size: int) -> None:
    """Tries a loss on the shape of patches `[2, size, size, 1]`, without computing anything.

    Raises:
      InputError: it refuses them or its options, or does not return one number a patch.
    """
    shape = jax.ShapeDtypeStruct((2, size, size, 1), jnp.float32)
    try:
        found = jax.eval_shape(loss, shape, shape)
    except Exception as error:  # whatever the user's function raises
        raise InputError(
            f"the loss {name} does not work on patches of {size}x{size}: {str(error).splitlines()[0]}"
        ) from None
    if getattr(found, "shape", None) != (2,):
        raise InputError(
            f"the loss {name} must return one number a patch, [b], not {getattr(found, 'shape', type(found))}"
        )
