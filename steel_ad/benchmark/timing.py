"""Timing of several implementations of one work, in turns, so that a machine's slow minutes come to all of them.

Ratios are still not free of neighbours: PyTorch's threads wait for each other at every operation, and lose more to a busy core than ours.
"""

import contextlib
import dataclasses
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from steel_ad import native

LEAST_REPEATS = 3

# What works are done on: two batches float32 `[b, h, w]`; images uint8 `[b, h, w]`; scores float32 and masks bool, `[b, h, w]`.
Images = Callable[[], tuple[np.ndarray, np.ndarray]]
Frames = Callable[[], np.ndarray]
Maps = Callable[[], tuple[np.ndarray, np.ndarray]]


def cpus() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Unavailable(Exception):
    """An implementation that cannot run here; the message says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """One implementation, compiled and with its inputs in place.

    Attributes:
      call: does the work and returns what `wait` can wait for.
      wait: returns when that is done.
      works: how often one call does the work (steps in one dispatch).
      compile_s: seconds from tracing to a loaded program, None where nothing is compiled.
      counted: XLA's "flops" and "bytes accessed" of the work done once, None or empty where it was not XLA alone.
      precision: of the arithmetic.
      warm: whether a call that is not timed goes before each block, since caches are another implementation's.
      extras: further keys of the row, asked for when all blocks are done.
      close: ends what the program holds: processes, folders.
    """

    call: Callable[[], Any]
    wait: Callable[[Any], Any] = jax.block_until_ready
    works: int = 1
    compile_s: float | None = None
    counted: Mapping[str, float] | None = None
    precision: str = "float32"
    warm: bool = True
    extras: Callable[[], Mapping[str, Any]] = dict
    close: Callable[[], Any] = lambda: None


# Returns the Program, or raises Unavailable or ImportError.
Maker = Callable[[], Program]


@dataclasses.dataclass(frozen=True)
class Work:
    """Something to be done, and implementation -> its maker.

    Attributes:
      flops, bytes: the FLOPs it takes and the least bytes it must move; None where they say nothing about its time.
      amounts: key of the row, such as "mpx_s" -> how much of that is done; the row has it per second.
      block_s: least seconds of a block of calls.
    """

    name: str
    flops: float | None
    bytes: float | None
    makers: Mapping[str, Maker]
    amounts: Mapping[str, float] = dataclasses.field(default_factory=dict)
    block_s: float = 0.05


def compiled(function: Any, *args: Any) -> tuple[Any, float, dict[str, float]]:
    """A jitted function compiled for these arguments, the seconds that took, and what XLA counts in it."""
    start = time.perf_counter()
    lowered = function.lower(*args)
    program = lowered.compile()
    seconds = time.perf_counter() - start
    # XLA counts nothing inside of calls to other code.
    return program, seconds, {} if "steel_ad_" in lowered.as_text() else dict(program.cost_analysis() or {})


def with_xla_alone(makers: dict[str, Maker], maker: Maker, ssim_window: int | None = None) -> dict[str, Maker]:
    """`makers`, and where `native` takes part in `maker` "steel_ad_xla", the same without it.

    Args:
      ssim_window: window in pixels of the SSIM map that the work has, which a GPU has natively; None without one.
    """
    takes_part = native.ready() or (ssim_window is not None and native.cuda_ready(ssim_window))

    def alone():
        with native.suspended():
            return maker()

    return {**makers, "steel_ad_xla": alone} if takes_part else makers


def seconds(program: Program, calls: int = 1) -> float:
    """Wall time of so many calls, the last one done."""
    start = time.perf_counter()
    for _ in range(calls):
        result = program.call()
    program.wait(result)
    return time.perf_counter() - start


def with_latency(program: Program) -> Program:
    """The program with each call waited for; the row gets the median, the longest and, of at least a hundred, the 99th percentile of
    all calls but the first two, and their number."""
    times: list[float] = []

    def call():
        start = time.perf_counter()
        result = program.call()
        program.wait(result)
        times.append(time.perf_counter() - start)
        return result

    def extras():
        ms = 1e3 * np.array(times[2:])
        found = {"p50_ms": float(np.median(ms)), "max_call_ms": float(ms.max()), "calls": len(ms)}
        if len(ms) >= 100:
            found["p99_ms"] = float(np.percentile(ms, 99))
        return {**program.extras(), **found}

    return dataclasses.replace(program, call=call, extras=extras)


def blocks(
    programs: Mapping[str, Program],
    *,
    repeats: int,
    budget_s: float,
    block_s: float,
    failed: dict[str, str] | None = None,
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """First call and steady state, in turns A B C A B C.

    Args:
      programs: implementation -> program.
      repeats: blocks of each.
      budget_s: an implementation that has used so much gets no further block, beyond the least number of repeats.
      block_s: least length of a block; a short work is called often enough to fill it.
      failed: gets implementation -> reason of those that raise, which are then in neither result; without it the error is passed on.

    Returns:
      Seconds of the very first call, and of one work in each block in order, both by implementation.
    """
    first: dict[str, float] = {}
    calls: dict[str, int] = {}
    spent = dict.fromkeys(programs, 0.0)
    found: dict[str, list[float]] = {name: [] for name in programs}

    def begin(name: str, program: Program) -> None:
        first[name] = seconds(program)
        # A call that is slow even with its start-up fills a block; of a quick one the second call tells.
        long = first[name] > 20 * block_s
        calls[name] = 1 if long else max(1, math.ceil(block_s / seconds(program)))

    def block(name: str, program: Program) -> None:
        done = len(found[name])
        if done >= LEAST_REPEATS and spent[name] * (done + 1) / done > budget_s:
            return
        # OpenMP's idle threads spin for up to 0.2 s after a call, on cores that the next implementation needs.
        time.sleep(min(0.25, 5 * block_s))
        if program.warm:
            seconds(program)
        elapsed = seconds(program, calls[name])
        spent[name] += elapsed
        found[name].append(elapsed / calls[name] / program.works)

    for run in (begin, *[block] * repeats):
        for name in list(found):
            try:
                run(name, programs[name])
            except Exception as error:
                if failed is None:
                    raise
                failed[name] = _reason(error)
                del found[name]
    return {name: first[name] for name in found}, found


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, Unavailable | ImportError):
        return text
    # Compilers' reasons go on for pages.
    return f"{type(error).__name__}: {text[:300]}"


def measure(
    work: Work, *, ours: str, repeats: int, budget_s: float, block_s: float = 0.05
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Times all implementations of a work that can run here.

    Args:
      ours: the implementation that `ratio` is relative to: the median over rounds of (its time / ours in that round). What others do
        in bfloat16 is relative to ours in bfloat16, `ours`_bf16.
      repeats, budget_s, block_s: as `blocks`'.

    Returns:
      One row an implementation, times in ms; and of those that cannot run, or fail, as without memory, why.
    """
    programs: dict[str, Program] = {}
    left_out: dict[str, str] = {}
    with contextlib.ExitStack() as ending:
        for name, make in work.makers.items():
            try:
                programs[name] = make()
            except Exception as error:
                left_out[name] = _reason(error)
            else:
                ending.callback(programs[name].close)
        first, found = blocks(programs, repeats=repeats, budget_s=budget_s, block_s=block_s, failed=left_out)
    programs = {name: program for name, program in programs.items() if name in found}
    rows = []
    for name, program in programs.items():
        times = found[name]
        counted = program.counted or {}
        # Ours in bfloat16 is itself relative to ours, where both are timed.
        half = f"{ours}_bf16"
        is_half = program.precision == "bfloat16" and half in found and not (name == half and ours in found)
        mine = half if is_half else ours
        ratios = [a / b for a, b in zip(times, found.get(mine, ()), strict=False)]
        rows.append(
            {
                "work": work.name,
                "impl": name,
                "median_ms": 1e3 * statistics.median(times),
                "min_ms": 1e3 * min(times),
                "max_ms": 1e3 * max(times),
                "repeats": len(times),
                "compile_s": program.compile_s,
                "first_ms": 1e3 * first[name],
                "ratio": statistics.median(ratios) if ratios else None,
                "precision": program.precision,
                "flops": work.flops,
                "bytes": work.bytes,
                "flops_counted": counted.get("flops"),
                "bytes_counted": counted.get("bytes accessed"),
                **{name: amount / statistics.median(times) for name, amount in work.amounts.items()},
                **program.extras(),
            }
        )
    return rows, left_out
