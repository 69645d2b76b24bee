"""What an inspection's rows say together: damaged rolls, and where on the coil the defects lie."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from steel_ad import config as configs
from steel_ad.inspection import recurrence
from steel_ad.inspection.strips import Strip

# Rows of the highest peaks that a period is looked for in.
_LOOKED_AT = 2000
# Two defects of a roll are no further apart across.
_PLACE_MM, _PLACE_PX = 10.0, 40.0


def rolls(
    config: configs.Inspection,
    strips: Sequence[Strip],
    sizes: Mapping[int, Sequence[int]],
    rows: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Periods of the defects on endless strips, by side, or by camera where a scale is not known; several rolls may be damaged."""
    results = []
    for side in sorted({s.camera.side for s in strips}, reverse=True):
        own = [i for i, s in enumerate(strips) if s.camera.side == side and not s.single]
        metric = all(strips[i].camera.mm_per_px for i in own)
        for members in [own] if metric and own else [[i] for i in own]:
            results += _periods(config, {i: strips[i] for i in members}, sizes, rows, "mm" if metric else "px")
    return results


def _periods(
    config: configs.Inspection,
    strips: Mapping[int, Strip],
    sizes: Mapping[int, Sequence[int]],
    rows: Sequence[dict[str, Any]],
    unit: str,
) -> list[dict[str, Any]]:
    """Of strips side by side."""
    metric = unit == "mm"
    scales = {i: s.camera.mm_per_px or 1 if metric else 1 for i, s in strips.items()}
    cameras = {s.camera.name: s.camera for s in strips.values()}
    length = max(sizes[i][0] * scale for i, scale in scales.items())
    seen = [r for r in rows if r["camera"] in cameras and not r["image"]]
    seen = sorted(seen, key=lambda r: -r["peak"])[:_LOOKED_AT]
    results: list[dict[str, Any]] = []
    for _ in range(5):
        one = recurrence.find(
            [r[f"along_{unit}"] for r in seen],
            [r[f"across_{unit}"] for r in seen],
            length,
            tolerance_mm=_PLACE_MM if metric else _PLACE_PX,
            look=np.log([[r["length_px"], r["width_px"]] for r in seen]).reshape(-1, 2),
            pitch_mm=config.pitch_mm if metric and config.pitch_mm else None,
            seed=config.seed,
        )
        if one is None or not one.periodic:
            break
        suspect = _own_period(one.period_mm, config.tile_px, strips, scales)
        results.append(
            {
                "side": next(iter(cameras.values())).side,
                "cameras": list(cameras),
                "unit": unit,
                "period": one.period_mm,
                "roll_diameter": one.roll_diameter_mm,
                "phase": one.phase_mm,
                "turns": one.turns,
                "turns_seen": one.seen,
                "p_value": one.p_value,
                "members": sorted(seen[k]["defect"] for k in one.members),
                "sentence": " ".join([recurrence.summary(one, unit), *suspect]),
            }
        )
        seen = [r for k, r in enumerate(seen) if k not in set(one.members)]
    return results


def _own_period(period: float, tile: int, strips: Mapping[int, Strip], scales: Mapping[int, float]) -> list[str]:
    """Sentences where a period is one that the camera or the inspection brings along."""
    found = {}
    for i, strip in strips.items():
        # Of many multiples one is near by chance.
        for what, side in (("tile", tile), ("frame", strip.frame_px or next(strip.frames()).shape[0])):
            step = side * scales[i]
            times = round(period / step)
            if times and abs(period - times * step) <= min(0.01 * period, 0.05 * step):
                number = "the height" if times == 1 else f"{times} times the height"
                found[what] = (
                    f"This is {number} of a {what}, so look whether the {what} makes the marks rather than a roll."
                )
    return list(found.values())


def coil(
    strips: Sequence[Strip],
    sizes: Mapping[int, Sequence[int]],
    rows: Sequence[dict[str, Any]],
    rolls: Sequence[dict[str, Any]],
):
    """Sides for the coil map, images laid end to end in the order of their names, and the unit."""
    from steel_ad.report.coils import Coil

    metric = all(s.camera.mm_per_px for s in strips)
    unit = "mm" if metric else "px"
    periodic = {defect for roll in rolls for defect in roll["members"]}
    sides = []
    for side in sorted({s.camera.side for s in strips}, reverse=True):
        lengths: dict[str, float] = {}
        edges = []
        for i, s in enumerate(strips):
            if s.camera.side == side:
                h, w = (n * (s.camera.mm_per_px or 1 if metric else 1) for n in sizes[i])
                start = s.camera.across_mm if metric else 0.0
                lengths[s.image] = max(lengths.get(s.image, 0), h)
                edges.append((start, start + w))
        ends = np.cumsum([lengths[name] for name in sorted(lengths)])
        offsets = dict(zip(sorted(lengths), [0.0, *ends], strict=False))
        scale = {s.camera.name: s.camera.mm_per_px or 1 if metric else 1 for s in strips}
        across = {s.camera.name: s.camera.across_mm if metric else 0.0 for s in strips}
        own = [r for r in rows if r["side"] == side]
        boxes = [
            [
                offsets[r["image"]] * d + start + r[f"{edge}_px"] * scale[r["camera"]]
                for edge, d, start in (
                    ("top", 1, 0.0),
                    ("left", 0, across[r["camera"]]),
                    ("bottom", 1, 0.0),
                    ("right", 0, across[r["camera"]]),
                )
            ]
            for r in own
        ]
        first = min(a for a, _ in edges)
        sides.append(
            Coil(
                name=side,
                length=float(ends[-1]),
                width=max(b for _, b in edges) - first,
                across=first,
                joints=ends[:-1].tolist(),
                boxes=np.array(boxes, np.float64).reshape(-1, 4),
                scores=np.array([r["peak"] for r in own], np.float64),
                periodic=np.array([r["defect"] in periodic for r in own], bool),
            )
        )
    return sides, unit
