"""The benchmark: works in groups, each done by ours and by peers, against ceilings measured in the same run.

A new group is a module with `works(*, tiny) -> list[Work]` and a line in `GROUPS`. Nothing here passes or fails on time.
"""

import dataclasses
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from steel_ad import files, native
from steel_ad.benchmark import cold_start, data, inspection, metrics, peers, ssim, sweep, train, unet
from steel_ad.benchmark.ceilings import ceilings as measure_ceilings
from steel_ad.benchmark.timing import LEAST_REPEATS, Work, cpus, measure
from steel_ad.errors import InputError
from steel_ad.report import tables

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
_RATES = ("mpx_s", "patches_s", "images_s", "p50_ms", "p99_ms", "max_call_ms", "calls")
_PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "dm-pix", "numpy", "scipy", "scikit-image", "scikit-learn"),
    *("opencv-python-headless", "torch", "torchmetrics", "pytorch-msssim"),
)
# Processors that others keep busy, from which on times are doubtful.
_BUSY = 0.5


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
      What the JSON holds: "device", "machine", "load" (processors busy in the minute before), "versions", "native", "precision",
      "flags", "ceilings" {"matmul_tflops", "copy_gbs"}, "ceilings_in_turn" (before and after the works; "ceilings" are the better
      ones), "rows".

    Raises:
      InputError: no such group, work or implementation, an `out` that is no .json or not writable, or no earlier run in `compare`;
        with status 1, when all else is done and written, that ours failed.
    """
    if out.suffix != ".json":
        raise InputError(f"--out={out} must end in .json: the picture next to it gets the same name and .png")
    if repeats < LEAST_REPEATS or not budget_s > 0:
        raise InputError(f"--repeats must be at least {LEAST_REPEATS} and --budget_s positive")
    earlier = None if compare is None else read(compare)
    # Names are known without what is compiled for this machine.
    with native.suspended():
        groups = {group: [work.name for work in make(tiny=tiny)] for group, make in GROUPS.items()}
    names = dict.fromkeys(name for group, members in groups.items() for name in (group, *members))
    if unknown := [name for name in only if name not in names]:
        raise InputError(f"there is no group or work {unknown[0]!r}: --only takes some of {', '.join(names)}")
    wanted = {name for group, members in groups.items() for name in members if not only or {group, name} & set(only)}
    chosen = [make for group, make in GROUPS.items() if wanted & set(groups[group])]
    works = [work for make in chosen for work in make(tiny=tiny) if work.name in wanted]
    known = {name: None for work in works for name in work.makers}
    if unknown := [name for name in impl if name not in known]:
        raise InputError(f"there is no implementation {unknown[0]!r} here: --impl takes some of {', '.join(known)}")
    if impl:
        makers = [{name: make for name, make in work.makers.items() if name in impl} for work in works]
        works = [dataclasses.replace(w, makers=m) for w, m in zip(works, makers, strict=True) if m]
    flags = {"only": list(only), "impl": list(impl), "repeats": repeats, "budget_s": budget_s, "tiny": tiny}
    # A program from the cache would be timed as compiled.
    cached = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        result, failed = _run(works, flags, out)
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
    if earlier is not None:
        print(f"\nAgainst {compare} ({earlier['device']}):")
        print(tables.table(comparison(earlier, result), ("work", "impl", *_COMPARED)))
        for key in ("device", "machine", "versions", "native", "precision", "flags", "ceilings"):
            if (was := earlier.get(key)) != (now := result[key]):
                print(f"Another {key}: {_difference(was, now)}")
    picture = f"; picture: {out.with_suffix('.png')}" if any(r["flops"] and r["bytes"] for r in result["rows"]) else ""
    print(f"\nEvery number: {out}{picture}")
    if failed:
        raise InputError(f"{OURS} failed in {', '.join(failed)} (why is said above): {out} has what did not", status=1)
    return result


def _run(works: list[Work], flags: dict[str, Any], out: Path) -> tuple[dict[str, Any], list[str]]:
    """What is written, and which works ours failed in."""
    from steel_ad.report.roofline import roofline

    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > _BUSY:
        print(f"note: {load:.1f} processors are busy already: wait until they are idle for times that can be trusted")
    ceilings = measure_ceilings(repeats=flags["repeats"], tiny=flags["tiny"])
    result: dict[str, Any] = {
        "device": _device(),
        "machine": _machine(),
        "load": load,
        "versions": _versions(),
        "native": native.forms(),
        "precision": "float32 parameters; products at jax's default precision",
        "flags": {**flags, "xla_flags": os.environ.get("XLA_FLAGS", "")},
        "ceilings": ceilings,
        "ceilings_in_turn": [ceilings],
        "rows": [],
    }
    failed = []
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
        if OURS in left_out:
            failed.append(work.name)
    again = measure_ceilings(repeats=flags["repeats"], tiny=flags["tiny"])
    result["ceilings_in_turn"].append(again)
    ceilings = result["ceilings"] = {name: max(value, again[name]) for name, value in ceilings.items()}
    for row in result["rows"]:
        row["roof_share"] = roof_share(row, ceilings)
    result["native"] = native.forms()
    files.write_json(out, result)
    if drawn := [row for row in result["rows"] if row["flops"] and row["bytes"]]:
        roofline(out.with_suffix(".png"), drawn, ceilings, title=f"Roofline, {result['device']}", ours=OURS)
    return result, failed


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
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        comparison(found, found)
        str(found["device"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{path} is no benchmark's JSON: give --compare what an earlier --out named") from None
    return found


_COMPARED = ("old_ms", "new_ms", "new/old", "old_times_ours", "new_times_ours")


def comparison(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a (work, impl) of either run: "work", "impl", "old_ms", "new_ms", "new/old" and, since machines change from hour to hour,
    how many times as long as ours it took in either run; None where one lacks it."""
    before, after = ({(r["work"], r["impl"]): r for r in run["rows"]} for run in (old, new))
    rows = []
    for key in [*after, *(k for k in before if k not in after)]:
        was, now = before.get(key, {}), after.get(key, {})
        change = now["median_ms"] / was["median_ms"] if was and now else None
        times = was.get("median_ms"), now.get("median_ms"), change, was.get("ratio"), now.get("ratio")
        rows.append({"work": key[0], "impl": key[1], **dict(zip(_COMPARED, times, strict=True))})
    return rows


def _difference(was: Any, now: Any) -> str:
    """Of two values of a run's JSON, in mappings the entries that are not alike."""
    if isinstance(now, dict):
        was = was or {}
        names = [name for name in dict.fromkeys((*was, *now)) if was.get(name) != now.get(name)]
        return ", ".join(f"{name} {_difference(was.get(name), now.get(name))}" for name in names)
    return " and now ".join("none" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in (was, now))


def _device() -> str:
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{jax.device_count()} x {device.device_kind}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {cpus()} cores"


def _machine() -> dict[str, Any]:
    """What distinguishes machines of one name: "cpus" that this process may use, their "vectors", and the C++ "compiler"."""
    info = Path("/proc/cpuinfo")
    words = set(info.read_text(encoding="utf-8").split()) if info.exists() else set()
    compiler = os.environ.get("CXX") or shutil.which("c++") or ""
    return {
        "cpus": cpus(),
        "vectors": " ".join(
            name for name in ("avx2", "fma", "avx512f", "avx512_bf16", "asimd", "sve") if name in words
        ),
        "compiler": _first_line(f"{compiler} --version") if compiler else "",
    }


def _first_line(command: str) -> str:
    done = subprocess.run(command, shell=True, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return next(iter(done.stdout.splitlines()), "") if done.returncode == 0 else ""


def _versions() -> dict[str, str]:
    from importlib import metadata

    # Of this file's own repository, not of one that it is installed within.
    commit = _first_line("git ls-files --error-unmatch __init__.py > /dev/null && git rev-parse HEAD")
    found = {"python": platform.python_version(), "commit": commit}
    # Of accelerators with the driver's and the libraries'.
    found["platform"] = " ".join(jax.devices()[0].client.platform_version.split())
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
