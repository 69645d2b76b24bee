"""The benchmark: works in groups, each done by ours and by peers, against ceilings measured in the same run.

A new group is a module with `works(*, tiny) -> list[Work]` and a line in `GROUPS`. Nothing here passes or fails on time.
"""

import dataclasses
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from steel_ad.errors import InputError
from steel_ad.report import tables
from steel_ad.studies import files
from steel_ad.studies.benchmark import cold_start, data, inspection, metrics, peers, ssim, sweep, train, unet
from steel_ad.studies.benchmark.ceilings import ceilings as measure_ceilings
from steel_ad.studies.benchmark.timing import LEAST_REPEATS, Work, measure

OURS = "steel_ad"

GROUPS: dict[str, Callable[..., list[Work]]] = {
    "ssim": ssim.works,
    "train": train.works,
    "inspection": inspection.works,
    "metrics": metrics.works,
    "data": data.works,
    "unet": unet.works,
    "sweep": sweep.works,
    "cold_start": cold_start.works,
}

_COLUMNS = (
    *("work", "impl", "median_ms", "min_ms", "max_ms", "repeats", "compile_s", "first_ms", "times_ours"),
    *("roof_share", "flops_counted", "bytes_counted"),
)
_RATES = ("mpx_s", "patches_s", "images_s", "p50_ms", "p99_ms")
_PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "dm-pix", "numpy", "scipy", "scikit-image", "scikit-learn"),
    *("opencv-python-headless", "torch"),
)


def run(
    *,
    only: Sequence[str],
    impl: Sequence[str] = (),
    out: Path,
    repeats: int,
    budget_s: float,
    tiny: bool,
    compare: Path | None,
) -> dict[str, Any]:
    """Times works, prints tables, writes `out` (JSON) after every work and at the end a roofline picture beside it (of works
    that have FLOPs).

    Args:
      only: names of groups and of works; none means all.
      impl: names of implementations; none means all.
      out: a .json file; the picture has the same name with .png.
      repeats: blocks of each implementation.
      budget_s: seconds after which an implementation gets no further block of a work (but three in any case).
      tiny: minute sizes without PyTorch, a check that everything runs.
      compare: an earlier run's JSON, or None.

    Returns:
      What the JSON holds: "device", "versions", "precision", "flags", "ceilings" {"matmul_tflops", "copy_gbs"}, "rows".

    Raises:
      InputError: no such group, work or implementation, an `out` that is no .json or not writable, or no earlier run in `compare`.
    """
    if out.suffix != ".json":
        raise InputError(f"--out={out} must end in .json: the picture next to it gets the same name and .png")
    if repeats < LEAST_REPEATS or not budget_s > 0:
        raise InputError(f"--repeats must be at least {LEAST_REPEATS} and --budget_s positive")
    earlier = None if compare is None else read(compare)
    found = {group: make(tiny=tiny) for group, make in GROUPS.items()}
    names = [name for group, members in found.items() for name in (group, *(work.name for work in members))]
    if unknown := [name for name in only if name not in names]:
        raise InputError(f"there is no group or work {unknown[0]!r}: --only takes some of {', '.join(names)}")
    works = [w for group, members in found.items() for w in members if not only or {group, w.name} & set(only)]
    known = {name: None for work in works for name in work.makers}
    if unknown := [name for name in impl if name not in known]:
        raise InputError(f"there is no implementation {unknown[0]!r} here: --impl takes some of {', '.join(known)}")
    if impl:
        chosen = [{name: make for name, make in work.makers.items() if name in impl} for work in works]
        works = [dataclasses.replace(w, makers=m) for w, m in zip(works, chosen, strict=True) if m]
    flags = {"only": list(only), "impl": list(impl), "repeats": repeats, "budget_s": budget_s, "tiny": tiny}
    # A program from the cache would be timed as compiled.
    cached = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        result = _run(works, flags, out)
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
    if earlier is not None:
        print(f"\nAgainst {compare} ({earlier['device']}):")
        columns = ("work", "impl", "old_ms", "new_ms", "new/old")
        print(tables.table(comparison(earlier, result), columns))
    picture = f"; picture: {out.with_suffix('.png')}" if any(r["flops"] and r["bytes"] for r in result["rows"]) else ""
    print(f"\nEvery number: {out}{picture}")
    return result


def _run(works: list[Work], flags: dict[str, Any], out: Path) -> dict[str, Any]:
    from steel_ad.report.roofline import roofline

    result: dict[str, Any] = {
        "device": _device(),
        "versions": _versions(),
        "precision": "float32 parameters; products at jax's default precision",
        "flags": {**flags, "xla_flags": os.environ.get("XLA_FLAGS", "")},
        "ceilings": measure_ceilings(repeats=flags["repeats"], tiny=flags["tiny"]),
        "rows": [],
    }
    ceilings = result["ceilings"]
    print(f"{result['device']}: {', '.join(f'{name} {value:.4g}' for name, value in ceilings.items())}")
    if not peers.torch_installed():
        print("PyTorch is not installed: its rows are left out.")
    files.write_json(out, result)
    for work in works:
        block_s = 0.0 if flags["tiny"] else work.block_s
        rows, left_out = measure(work, ours=OURS, repeats=flags["repeats"], budget_s=flags["budget_s"], block_s=block_s)
        for row in rows:
            row["roof_share"] = roof_share(row, ceilings)
        result["rows"] += rows
        files.write_json(out, result)
        columns = (*_COLUMNS, *(name for name in _RATES if any(name in row for row in rows)))
        print(f"\n{tables.table([_shown(row) for row in rows], columns)}", flush=True)
        for name, reason in left_out.items():
            print(f"{name} is left out: {reason}")
    if drawn := [row for row in result["rows"] if row["flops"] and row["bytes"]]:
        roofline(out.with_suffix(".png"), drawn, ceilings, title=f"Roofline, {result['device']}", ours=OURS)
    return result


def roof_share(row: Mapping[str, Any], ceilings: Mapping[str, float]) -> float | None:
    """What a row reaches of the rate that the machine's ceilings allow for its FLOPs and bytes, 1 at best; None without both."""
    if row["flops"] is None and row["bytes"] is None:
        return None
    peak = ceilings["matmul_bf16_tflops" if row["precision"] == "bfloat16" else "matmul_tflops"] * 1e12
    least_s = max((row["flops"] or 0) / peak, (row["bytes"] or 0) / (ceilings["copy_gbs"] * 1e9))
    return 1e3 * least_s / row["median_ms"]


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with XLA's counts as multiples of the analytic ones."""
    relative = {
        f"{n}_counted": row[f"{n}_counted"] / row[n] if row[f"{n}_counted"] and row[n] else None
        for n in ("flops", "bytes")
    }
    return {**row, **relative, "times_ours": row["ratio"]}


def read(path: Path) -> dict[str, Any]:
    """An earlier run's JSON.

    Raises:
      InputError: no such file, or not one of a benchmark.
    """
    if not path.is_file():
        raise InputError(f"there is no earlier run {path}: give --compare the JSON of one")
    found = files.read_json(path)
    if not isinstance(found, dict) or not {"device", "rows"} <= set(found):
        raise InputError(f"{path} is no benchmark's JSON: give --compare what an earlier --out named")
    return found


def comparison(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a (work, impl) of either run: "work", "impl", "old_ms", "new_ms", "new/old"; None where one run lacks it."""
    before, after = ({(r["work"], r["impl"]): r["median_ms"] for r in run["rows"]} for run in (old, new))
    rows = []
    for key in [*after, *(k for k in before if k not in after)]:
        was, now = before.get(key), after.get(key)
        rows.append(
            {
                "work": key[0],
                "impl": key[1],
                "old_ms": was,
                "new_ms": now,
                "new/old": now / was if was and now else None,
            }
        )
    return rows


def _device() -> str:
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{jax.device_count()} x {device.device_kind}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def _versions() -> dict[str, str]:
    from importlib import metadata

    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
