"""What the rows of a ledger say of a whole coil: damaged rolls, and where on the coil the defects lie."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from steel_ad import config as configs
from steel_ad.inspection import recurrence
from steel_ad.inspection.strips import Strip

# A period is looked for in the rows of the highest peaks.
_LOOKED_AT = 2000
# Several rolls of a line may be damaged.
_MOST_ROLLS = 5
# Two defects of a roll are no further apart across.
_PLACE_MM, _PLACE_PX = 10.0, 40.0


def rolls(
    config: configs.Inspection,
    strips: Sequence[Strip],
    sizes: Mapping[int, Sequence[int]],
    rows: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Periods of the defects on endless strips.

    The cameras of a side are looked at together; each by itself where a camera has no scale.

    Args:
      sizes: `[h, w]` of each strip, px, by its index.
      rows: of the ledger, numbered as `defect`.
    """
    results = []
    for side in sorted({s.camera.side for s in strips}, reverse=True):
        endless = [i for i, s in enumerate(strips) if s.camera.side == side and not s.single]
        metric = all(strips[i].camera.mm_per_px for i in endless)
        for members in [endless] if metric and endless else [[i] for i in endless]:
            results += _periods(config, {i: strips[i] for i in members}, sizes, rows, "mm" if metric else "px")
    return results


def _periods(
    config: configs.Inspection,
    strips: Mapping[int, Strip],
    sizes: Mapping[int, Sequence[int]],
    rows: Sequence[dict[str, Any]],
    unit: str,
) -> list[dict[str, Any]]:
    """Periods of strips that lie side by side."""
    metric = unit == "mm"
    scales = {i: s.camera.mm_per_px or 1 if metric else 1 for i, s in strips.items()}
    cameras = {s.camera.name: s.camera for s in strips.values()}
    length = max(sizes[i][0] * scale for i, scale in scales.items())
    seen = [r for r in rows if r["camera"] in cameras and not r["image"]]
    seen = sorted(seen, key=lambda r: -r["peak"])[:_LOOKED_AT]
    results: list[dict[str, Any]] = []
    for _ in range(_MOST_ROLLS):
        best = recurrence.find(
            [r[f"along_{unit}"] for r in seen],
            [r[f"across_{unit}"] for r in seen],
            length,
            tolerance_mm=_PLACE_MM if metric else _PLACE_PX,
            look=np.log([[r["length_px"], r["width_px"]] for r in seen]).reshape(-1, 2),
            pitch_mm=config.pitch_mm if metric and config.pitch_mm else None,
            seed=config.seed,
        )
        if best is None or not best.periodic:
            break
        doubts = _doubts(best.period_mm, config.tile_px, strips, scales)
        results.append(
            {
                "side": next(iter(cameras.values())).side,
                "cameras": list(cameras),
                "unit": unit,
                "period": best.period_mm,
                "roll_diameter": best.roll_diameter_mm,
                "phase": best.phase_mm,
                "turns": best.turns,
                "turns_seen": best.seen,
                "p_value": best.p_value,
                "members": sorted(seen[k]["defect"] for k in best.members),
                "sentence": " ".join([recurrence.summary(best, unit), *doubts]),
            }
        )
        seen = [r for k, r in enumerate(seen) if k not in set(best.members)]
    return results


def _doubts(period: float, tile: int, strips: Mapping[int, Strip], scales: Mapping[int, float]) -> list[str]:
    """Sentences about a period that the tiles or the camera's frames have too."""
    sentences = {}
    for i, strip in strips.items():
        for what, side in (("tile", tile), ("frame", strip.frame_px or next(strip.frames()).shape[0])):
            step = side * scales[i]
            times = round(period / step)
            # The second bound: of many multiples, one is near by chance.
            if times and abs(period - times * step) <= min(0.01 * period, 0.05 * step):
                number = "the height" if times == 1 else f"{times} times the height"
                sentences[what] = (
                    f"This is {number} of a {what}, so look whether the {what} makes the marks rather than a roll."
                )
    return list(sentences.values())


def sides(
    strips: Sequence[Strip],
    sizes: Mapping[int, Sequence[int]],
    rows: Sequence[dict[str, Any]],
    rolls: Sequence[dict[str, Any]],
):
    """The sides of the coil map, with images laid end to end in the order of their names, and the map's unit.

    Args:
      sizes, rows: as of `rolls`.
      rolls: as `rolls` returns them; their defects are marked.

    Returns:
      (list of `report.coils.Coil`, "mm" or "px").
    """
    from steel_ad.report.coils import Coil

    metric = all(s.camera.mm_per_px for s in strips)
    scale = {s.camera.name: s.camera.mm_per_px or 1 if metric else 1 for s in strips}
    across = {s.camera.name: s.camera.across_mm if metric else 0.0 for s in strips}
    periodic = {defect for roll in rolls for defect in roll["members"]}
    coils = []
    for side in sorted({s.camera.side for s in strips}, reverse=True):
        lengths: dict[str, float] = {}
        edges = []
        for i, s in enumerate(strips):
            if s.camera.side == side:
                h, w = (n * scale[s.camera.name] for n in sizes[i])
                lengths[s.image] = max(lengths.get(s.image, 0), h)
                edges.append((across[s.camera.name], across[s.camera.name] + w))
        ends = np.cumsum([lengths[name] for name in sorted(lengths)])
        offsets = dict(zip(sorted(lengths), [0.0, *ends], strict=False))
        members = [r for r in rows if r["side"] == side]
        boxes = []
        for r in members:
            start = {"top": offsets[r["image"]], "left": across[r["camera"]]}
            start |= {"bottom": start["top"], "right": start["left"]}
            boxes.append(
                [start[edge] + r[f"{edge}_px"] * scale[r["camera"]] for edge in ("top", "left", "bottom", "right")]
            )
        first = min(a for a, _ in edges)
        coils.append(
            Coil(
                name=side,
                length=float(ends[-1]),
                width=max(b for _, b in edges) - first,
                across=first,
                joints=ends[:-1].tolist(),
                boxes=np.array(boxes, np.float64).reshape(-1, 4),
                scores=np.array([r["peak"] for r in members], np.float64),
                periodic=np.array([r["defect"] in periodic for r in members], bool),
            )
        )
    return coils, "mm" if metric else "px"
