"""Optimisers and learning-rate schedules of the settings."""

from typing import Protocol

import optax

# Adadelta's "default settings" (learning rate, rho, epsilon) differ from library to library (SPEC section 2).
ADADELTA = {"tf_keras": (0.001, 0.95, 1e-7), "old_keras": (1.0, 0.95, 1e-7), "pytorch": (1.0, 0.9, 1e-6)}


class Rate(Protocol):
    """What a schedule reads of the settings."""

    @property
    def learning_rate(self) -> float: ...
    @property
    def warmup_steps(self) -> int: ...
    @property
    def schedule(self) -> str: ...
    @property
    def clip_norm(self) -> float: ...


def schedule(config: Rate, total_steps: int) -> optax.Schedule:
    """Learning rate by step: a linear warm-up from 0, then constant or a cosine to 0 at `total_steps`."""
    if config.schedule == "cosine":
        rate = optax.cosine_decay_schedule(config.learning_rate, max(1, total_steps - config.warmup_steps))
    else:
        rate = optax.constant_schedule(config.learning_rate)
    if not config.warmup_steps:
        return rate
    ramp = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    return optax.join_schedules([ramp, rate], [config.warmup_steps])


def clipped(rule: optax.GradientTransformation, config: Rate) -> optax.GradientTransformation:
    """The rule behind a limit on the gradient's norm, where the settings have one."""
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), rule) if config.clip_norm else rule


def adadelta(defaults: str) -> optax.GradientTransformation:
    """Adadelta with the default settings of the library that `defaults` names, a key of `ADADELTA`."""
    learning_rate, rho, eps = ADADELTA[defaults]
    return optax.adadelta(learning_rate, rho=rho, eps=eps)
