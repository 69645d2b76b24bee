"""The list of defects: connected regions of the opened map above the threshold, one row each.

A strip comes in bands of rows. A region is kept as sums over its pixels, so that regions of neighbouring bands unite exactly, and
a region along a whole coil takes no more memory than a dot.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import ndimage, sparse
from scipy.sparse import csgraph

from steel_ad.errors import InputError

_EIGHT_CONNECTED = np.ones((3, 3), bool)
_SIDES = ("top", "bottom")
# Keys of `row`, in its order.
COLUMNS = (
    *("camera", "side", "image", "top_px", "left_px", "bottom_px", "right_px", "along_px", "across_px", "area_px"),
    *("length_px", "width_px", "orientation_deg", "peak", "mean", "p_value"),
    *("along_mm", "across_mm", "area_mm2", "length_mm", "width_mm"),
)


@dataclasses.dataclass(frozen=True)
class Region:
    """A connected region, 8-connected, in pixels of its strip or image: y along (rows), x across.

    Attributes:
      top, left, bottom, right: bounding box, bottom and right exclusive.
      area: number of pixels.
      sums: of y, x, y^2, x^2 and xy over the pixels, as exact whole numbers.
      total: sum of the opened map over the pixels.
      peak: maximum of the opened map there.
      peak_y, peak_x: the first pixel, in reading order, that has the peak.
    """

    top: int
    left: int
    bottom: int
    right: int
    area: int
    sums: tuple[int, int, int, int, int]
    total: float
    peak: float
    peak_y: int
    peak_x: int

    def merged(self, other: "Region") -> "Region":
        """Both together."""
        first, second = sorted((self, other), key=lambda r: (-r.peak, r.peak_y, r.peak_x))
        return Region(
            min(self.top, other.top),
            min(self.left, other.left),
            max(self.bottom, other.bottom),
            max(self.right, other.right),
            self.area + other.area,
            tuple(a + b for a, b in zip(self.sums, other.sums, strict=True)),  # type: ignore[arg-type]
            first.total + second.total,
            first.peak,
            first.peak_y,
            first.peak_x,
        )


@dataclasses.dataclass(frozen=True)
class Open:
    """Regions that touch a band's last row, and that row: `labels` int32 `[w]`, 0 or 1 + the region's index."""

    regions: tuple[Region, ...]
    labels: np.ndarray


def nothing(width: int) -> Open:
    """Before the first band of a strip of `width` pixels."""
    return Open((), np.zeros(width, np.int32))


def advance(before: Open, opened: np.ndarray, threshold: float, *, top: int) -> tuple[list[Region], Open]:
    """Goes on by a band of a strip.

    Args:
      before: regions that the band above left open.
      opened: opened map `[h, w]`, float; a pixel is defective where it is above the threshold.
      threshold: compared in float64.
      top: the strip's row that the band begins with.

    Returns:
      The regions that ended, ordered by top and left, and the regions that may go on. After the last band these are complete too.
    """
    mask = opened > np.float64(threshold)
    labels, count = ndimage.label(mask, _EIGHT_CONNECTED, output=np.int32)
    nodes = [*before.regions, *_measured(opened, mask, labels, count, top)]
    old = len(before.regions)
    above = np.pad(before.labels, 1)
    pairs = [np.zeros((2, 0), np.int64)]
    for shift in (0, 1, 2):
        over = above[shift : shift + mask.shape[1]]
        both = (over > 0) & (labels[0] > 0)
        pairs.append(np.stack([over[both] - 1, labels[0][both] - 1 + old]))
    links = np.concatenate(pairs, 1)
    graph = sparse.coo_matrix((np.ones(links.shape[1], bool), tuple(links)), (len(nodes), len(nodes)))
    components, of = csgraph.connected_components(graph, directed=False) if nodes else (0, np.zeros(0, np.int32))
    united: list[Region | None] = [None] * components
    for node, k in zip(nodes, of, strict=True):
        known = united[k]
        united[k] = node if known is None else known.merged(node)
    last = np.where(labels[-1] > 0, np.append(of, 0)[labels[-1] - 1 + old], -1)
    going = np.unique(last[last >= 0])
    closed = [region for k, region in enumerate(united) if region is not None and k not in set(going.tolist())]
    numbers = np.zeros(components + 1, np.int32)
    numbers[going] = 1 + np.arange(going.size, dtype=np.int32)
    left_open = Open(tuple(united[k] for k in going), numbers[last] * (last >= 0))
    return sorted(closed, key=lambda r: (r.top, r.left)), left_open


def _measured(opened: np.ndarray, mask: np.ndarray, labels: np.ndarray, count: int, top: int) -> list[Region]:
    if not count:
        return []
    y, x = np.nonzero(mask)
    of, value = labels[mask] - 1, opened[mask].astype(np.float64)
    y_, x_ = y.astype(np.float64), x.astype(np.float64)
    # Whole numbers below 2^53, so exact.
    sums = [np.bincount(of, w, count).astype(np.int64).tolist() for w in (y_, x_, y_ * y_, x_ * x_, y_ * x_)]
    area, total = np.bincount(of, minlength=count).tolist(), np.bincount(of, value, count).tolist()
    order = np.lexsort((x, y, -value, of))
    peaks = order[np.searchsorted(of[order], np.arange(count))]
    found = []
    for k, (rows, columns) in enumerate(ndimage.find_objects(labels)):
        n, (sy, sx, syy, sxx, sxy) = area[k], (s[k] for s in sums)
        moved = (sy + n * top, sx, syy + 2 * top * sy + n * top * top, sxx, sxy + top * sx)
        box = (top + rows.start, columns.start, top + rows.stop, columns.stop)
        peak = peaks[k]
        found.append(Region(*box, n, moved, total[k], float(value[peak]), top + int(y[peak]), int(x[peak])))
    return found


@dataclasses.dataclass(frozen=True)
class Camera:
    """Where a camera looks.

    Attributes:
      name: of the camera.
      side: of the plate, "top" or "bottom".
      across_mm: position across of its first column's outer edge.
      mm_per_px: of the plate, in both directions; None where it is not known.
    """

    name: str = "camera"
    side: str = "top"
    across_mm: float = 0.0
    mm_per_px: float | None = None

    def __post_init__(self):
        if self.side not in _SIDES:
            raise InputError(f"camera {self.name}: side {self.side!r} must be one of {', '.join(_SIDES)}")
        if not math.isfinite(self.across_mm):
            raise InputError(f"camera {self.name}: across_mm={self.across_mm} must be a number of millimetres")
        if self.mm_per_px is not None and not 0 < self.mm_per_px < math.inf:
            raise InputError(f"camera {self.name}: mm_per_px={self.mm_per_px} must be positive")


def row(region: Region, camera: Camera, *, image: str, p_value: float | None) -> dict[str, Any]:
    """A region as a row of the ledger.

    Returns:
      The keys `COLUMNS`: bounding box, bottom and right exclusive; centroid `along_px`, `across_px`, that of the first pixel
      being 0.5; `length_px`, `width_px` of the rectangle with the region's second moments; `orientation_deg` of its length, in
      (-90, 90], 0 along the strip, positive where across grows with along; `peak`, `mean` of the opened map; `p_value`, None
      without calibration; the same in mm, None where the scale is not known.
    """
    n, (sy, sx, syy, sxx, sxy) = region.area, region.sums
    # In whole numbers up to here: far along a strip, the squares are large and their differences small.
    yy, xx, xy = (n * syy - sy * sy) / n**2 + 1 / 12, (n * sxx - sx * sx) / n**2 + 1 / 12, (n * sxy - sy * sx) / n**2
    half, root = (yy + xx) / 2, math.hypot((yy - xx) / 2, xy)
    length, width = math.sqrt(12 * (half + root)), math.sqrt(12 * max(half - root, 0.0))
    along, across, scale = sy / n + 0.5, sx / n + 0.5, camera.mm_per_px
    pixels = {
        "camera": camera.name,
        "side": camera.side,
        "image": image,
        "top_px": region.top,
        "left_px": region.left,
        "bottom_px": region.bottom,
        "right_px": region.right,
        "along_px": along,
        "across_px": across,
        "area_px": n,
        "length_px": length,
        "width_px": width,
        "orientation_deg": math.degrees(0.5 * math.atan2(2 * xy, yy - xx)) if root > 0 else 0.0,
        "peak": region.peak,
        "mean": region.total / n,
        "p_value": p_value,
    }
    if scale is None:
        return {**pixels, **dict.fromkeys(("along_mm", "across_mm", "area_mm2", "length_mm", "width_mm"))}
    return {
        **pixels,
        "along_mm": along * scale,
        "across_mm": camera.across_mm + across * scale,
        "area_mm2": n * scale * scale,
        "length_mm": length * scale,
        "width_mm": width * scale,
    }


def ordered(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows by side, image, position along and across, and camera, numbered from 1 as `defect`."""

    def place(r: Mapping[str, Any]):
        millimetres = r["along_mm"] is not None
        along, across = (r["along_mm"], r["across_mm"]) if millimetres else (r["along_px"], r["across_px"])
        return _SIDES.index(r["side"]), r["image"], along, across, r["camera"]

    return [{"defect": i, **r} for i, r in enumerate(sorted(rows, key=place), 1)]


def deduplicated(rows: Sequence[Mapping[str, Any]], cameras: Sequence[Camera]) -> list[Mapping[str, Any]]:
    """The rows without those that another camera sees better.

    Two rows are of one defect if they are of different cameras, on one side of one image or strip, and their bounding boxes
    meet in mm. The row of the larger area stays, and the first of two equal ones. Boxes without a scale cannot meet.
    """
    known = {camera.name: camera for camera in cameras}
    boxes = np.array([_box(r, known[r["camera"]]) for r in rows]).reshape(-1, 4)
    groups: dict[tuple[str, str], list[int]] = {}
    for i, r in enumerate(rows):
        if known[r["camera"]].mm_per_px is not None:
            groups.setdefault((r["side"], r["image"]), []).append(i)
    dropped: set[int] = set()
    for members in groups.values():
        meeting = _meeting(members, boxes, [r["camera"] for r in rows])
        kept: set[int] = set()
        for i in sorted(members, key=lambda i: -rows[i]["area_mm2"]):
            (dropped if meeting.get(i, set()) & kept else kept).add(i)
    return [r for i, r in enumerate(rows) if i not in dropped]


def _meeting(members: Sequence[int], boxes: np.ndarray, cameras: Sequence[str]) -> dict[int, set[int]]:
    """The boxes of other cameras that each box meets. Boxes are compared along the strip, while they are abreast."""
    found: dict[int, set[int]] = {}
    if len({cameras[i] for i in members}) < 2:
        return found
    abreast: list[int] = []
    for i in sorted(members, key=lambda i: boxes[i, 0]):
        top, left, _, right = boxes[i]
        abreast = [k for k in abreast if boxes[k, 2] > top]
        for k in abreast:
            if cameras[k] != cameras[i] and boxes[k, 1] < right and boxes[k, 3] > left:
                found.setdefault(i, set()).add(k)
                found.setdefault(k, set()).add(i)
        abreast.append(i)
    return found


def _box(r: Mapping[str, Any], camera: Camera) -> tuple[float, float, float, float]:
    scale, offset = camera.mm_per_px or math.nan, camera.across_mm
    return r["top_px"] * scale, offset + r["left_px"] * scale, r["bottom_px"] * scale, offset + r["right_px"] * scale
