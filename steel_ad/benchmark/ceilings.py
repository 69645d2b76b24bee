"""What this machine can do: the fastest matrix product and the fastest pass over memory, measured."""

import functools

import jax
import jax.numpy as jnp

from steel_ad.benchmark.timing import Program, seconds
from steel_ad.ops.convolution import cpu_compiler_options


def ceilings(*, repeats: int, tiny: bool) -> dict[str, float]:
    """`matmul_tflops` of a float32 product at jax's default precision, on accelerators `matmul_bf16_tflops`, and `copy_gbs`,
    bytes read plus bytes written in GB/s. Each is the best of so many repeats."""
    on_cpu = jax.default_backend() == "cpu"
    side = 256 if tiny else 2048 if on_cpu else 8192
    found = {"matmul_tflops": _product(jnp.float32, side, repeats)}
    if not on_cpu:
        found["matmul_bf16_tflops"] = _product(jnp.bfloat16, side, repeats)
    return found | {"copy_gbs": _pass(2**20 if tiny else 2**26 if on_cpu else 2**29, repeats)}


def _product(dtype, side: int, repeats: int) -> float:
    a = jnp.ones((side, side), dtype)
    best = []
    # XLA's CPU backend has two matrix libraries.
    for options in [None, *filter(None, [cpu_compiler_options()])]:
        multiply = jax.jit(jnp.matmul, compiler_options=options)
        program = Program(call=functools.partial(multiply, a, a))
        seconds(program)
        best += [seconds(program) for _ in range(repeats)]
    return 2 * side**3 / min(best) / 1e12


def _pass(count: int, repeats: int) -> float:
    # In place, since fresh memory costs page faults that a running program does not have.
    negate = jax.jit(jnp.negative, donate_argnums=0)
    x = jnp.ones(count, jnp.float32)

    def call():
        nonlocal x
        x = negate(x)
        return x

    program = Program(call=call)
    seconds(program)
    return 2 * x.nbytes / min(seconds(program) for _ in range(repeats)) / 1e9
