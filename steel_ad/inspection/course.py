"""An inspection under way: bands go in, regions, scores and drift come out, and the journal notes each band."""

import base64
import copy
import dataclasses
import heapq
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from steel_ad.data import folders
from steel_ad.inspection import calibration, drift, journal, ledger, strips, tiles
from steel_ad.inspection.good_tiles import Reference
from steel_ad.inspection.journal import CloseUps, Journal
from steel_ad.inspection.strips import Strip
from steel_ad.inspection.tiles import Band
from steel_ad.inspection.view import View

# Regions that have a close-up, and its side.
_WORST = 24
_CLOSE_UP_PX = 96


@dataclasses.dataclass
class Findings:
    """What an inspection has found so far.

    Attributes:
      rows: of the ledger, one a region.
      scores: of all tiles.
      sizes: `[h, w]` of each finished strip, px.
      close_ups: PNG in base64 of the regions with the highest peaks, by the index of their row.
      worst: heap of (peak, -index) of the rows that have a close-up.
      unread: a sentence about each strip that could not be read to its end.
      quantities: what drift compares, by name, one value a band.
      inspected_px: pixels that this process has inspected.
    """

    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    scores: array = dataclasses.field(default_factory=lambda: array("d"))
    sizes: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    close_ups: dict[int, str] = dataclasses.field(default_factory=dict)
    worst: list[tuple[float, int]] = dataclasses.field(default_factory=list)
    unread: list[str] = dataclasses.field(default_factory=list)
    quantities: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    inspected_px: int = 0

    def copy(self) -> "Findings":
        """A copy that grows by itself."""
        copies = {f.name: copy.copy(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return Findings(**{**copies, "quantities": {name: [*values] for name, values in self.quantities.items()}})

    def wants(self, peak: float) -> bool:
        """Whether a region with this peak would be among the worst so far."""
        return len(self.worst) < _WORST or peak > self.worst[0][0]

    def add(self, record: dict[str, Any]) -> None:
        """Takes in a line of the journal."""
        self.scores.extend(record["scores"])
        for name, value in record.get("drawn", {}).items():
            self.quantities.setdefault(name, []).append(np.nan if value is None else value)
        if record["finished"]:
            self.sizes[record["strip"]] = record["size"]
            self.unread += [record["unread"]] if record["unread"] else []
        for row, close_up in zip(record["rows"], record["close_ups"], strict=True):
            if close_up is not None and self.wants(row["peak"]):
                # Of equal peaks the first ones stay.
                heapq.heappush(self.worst, (row["peak"], -len(self.rows)))
                self.close_ups[len(self.rows)] = close_up
                if len(self.worst) > _WORST:
                    del self.close_ups[-heapq.heappop(self.worst)[1]]
            self.rows.append(row)


class Course:
    """An inspection under way.

    Attributes:
      strips: those that have begun, and any that are known to come.
      findings: of all bands so far.
      at: index of the strip under way, or of the last finished one; -1 before the first.
      done: bands of that strip that are inspected; 0 where the next strip is to begin.
      unread: a sentence about each strip that could not be read to its end, by strip, until it is noted.
      files: what the next line of the journal says of new files.
    """

    def __init__(
        self, view: View, strips: list[Strip], reference: Reference, journal: Journal | None, *, tell: bool = False
    ):
        """`tell`: each strip's defects are printed as they are found."""
        self.strips, self.findings = strips, Findings()
        self.at, self.done = -1, 0
        self.unread: dict[int, str] = {}
        self.files: list[Any] = []
        self._view, self._reference, self._journal, self._tell = view, reference, journal, tell
        self._size = [0, 0]
        self._pending, self._close_ups = ledger.nothing(0), CloseUps()
        self._warned: set[str] = set()

    def resume(self, *, finished: bool = False) -> list[Any]:
        """Takes in the journal, or its lines of finished strips; returns all that they say of files."""
        record: dict[str, Any] | None = None
        known: list[Any] = []
        for record in self._journal.read(finished=finished) if self._journal else ():
            self.findings.add(record)
            known += record.get("files", [])
        if record is not None:
            self.at = record["strip"]
            if not record["finished"]:
                self.done, self._size = record["bands"], record["size"]
                self._pending, self._close_ups = journal.pending_from_json(record["open"])
        if self._reference.good:
            self._warned = {moved.quantity for moved in drift.history(self.findings.quantities, self._reference.good)}
        return known

    def fork(self, *, tell: bool) -> "Course":
        """A copy that can be brought to its end without a line in the journal, while this course goes on."""
        other = copy.copy(self)
        other.findings, other._warned, other.files = self.findings.copy(), {*self._warned}, []
        other._journal, other._tell = None, tell
        return other

    def feed(self, bands: Iterable[tuple[int, Band]]) -> None:
        """Inspects the bands that follow, given as (strip, band).

        Raises:
          InputError: as `View.maps`; a strip smaller than a tile, for which calibration promises nothing; a full disk.
        """
        for strip, band, opened in self._view.maps(bands):
            if strip != self.at:
                self.finish(strip)
                self.at, self._pending, self._close_ups = strip, ledger.nothing(opened.shape[1]), {}
            if self._reference.scores.size:
                shape = (band.offset + band.height, opened.shape[1])
                strips.check_size(self.strips[strip].paths[0], shape, self._view.tile)
            self._advance(band, opened)

    def _advance(self, band: Band, opened: np.ndarray) -> None:
        """Goes on by a band of the strip under way."""
        closed, self._pending = ledger.advance(self._pending, opened, self._reference.threshold, top=band.top)
        # A region outside the worst ones now can never be one of them later, so its close-up is not needed.
        wanted = [r for r in (*closed, *self._pending.regions) if self.findings.wants(r.peak)]
        self._close_ups = _close_ups(self._close_ups, band, wanted)
        self.findings.inspected_px += opened.size
        self.done, self._size = self.done + 1, [band.top + band.height, opened.shape[1]]
        scores = tiles.maxima(opened, self._view.tile).tolist()
        # Bands of one plate resemble each other, and drift takes independent tiles: one of each plate.
        drawn = self._drawn(band, scores) if self.done == 1 or not self.strips[self.at].single else {}
        pending = journal.pending_to_json(self._pending, self._close_ups)
        self._note(self.at, closed, scores=scores, drawn=drawn, bands=self.done, size=self._size, open=pending)
        for moved in drift.moved(self.findings.quantities, self._reference.good) if drawn else ():
            if moved.quantity not in self._warned:
                print(f"warning: {moved}", flush=True)
                self._warned.add(moved.quantity)
        left = {(r.peak_y, r.peak_x) for r in self._pending.regions}
        self._close_ups = {peak: png for peak, png in self._close_ups.items() if peak in left}

    def finish(self, following: int) -> None:
        """Closes the strip under way, and the strips before `following` of which nothing could be read."""
        if self.done:
            unread = self.unread.get(self.at)
            self._note(self.at, self._pending.regions, finished=True, size=self._size, unread=unread)
        for i in range(self.at + 1, following):
            self._note(i, (), finished=True, size=[0, 0], unread=self.unread.get(i))
        self.at, self.done = max(self.at, following - 1), 0

    def _drawn(self, band: Band, scores: Sequence[float]) -> dict[str, float | None]:
        """What drift compares of one random tile of a band; nothing where no tile is whole or nothing was calibrated."""
        whole = tiles.whole(band, tile=self._view.tile)
        if not len(whole) or not self._reference.good:
            return {}
        k = int(np.random.default_rng([self.at, self.done, 0xD4]).integers(len(whole)))
        measured = drift.measure(whole[k : k + 1], self._reference.lattice)
        return {"score": scores[k]} | {name: None if np.isnan(v[0]) else float(v[0]) for name, v in measured.items()}

    def _note(self, strip: int, regions: Sequence[ledger.Region], **state: Any) -> None:
        """Adds a line to the journal and to the findings."""
        source, good = self.strips[strip], self._reference.scores
        p_values = calibration.p_values([r.peak for r in regions], good).tolist()
        rows = [
            ledger.row(r, source.camera, image=source.image, p_value=p if good.size else None)
            for r, p in zip(regions, p_values, strict=True)
        ]
        line = {
            "strip": strip,
            "finished": False,
            "unread": None,
            "scores": [],
            "rows": rows,
            "close_ups": [self._close_ups.get((r.peak_y, r.peak_x)) for r in regions],
            **({"files": self.files} if self.files else {}),
            **state,
        }
        if self._journal:
            self._journal.write(line)
        self.findings.add(line)
        self.files = []
        if rows and self._tell:
            worst = max(rows, key=lambda r: r["peak"])
            place = f"{worst['along_px']:.0f} px along, {worst['across_px']:.0f} px across"
            print(f"{source.image or 'strip'}: defects: {len(rows)}, peak {worst['peak']:.3g} at {place}", flush=True)


def _close_ups(known: CloseUps, band: Band, regions: Sequence[ledger.Region]) -> CloseUps:
    """Close-ups around the regions' peaks; those of peaks in earlier bands are `known`."""
    close_ups = {}
    rows, columns = band.pixels.shape
    for r in regions:
        peak = (r.peak_y, r.peak_x)
        if peak in known:
            close_ups[peak] = known[peak]
            continue
        centre = r.peak_y - (band.top - band.offset) + band.core
        y, x = (
            int(np.clip(c - _CLOSE_UP_PX // 2, 0, max(0, n - _CLOSE_UP_PX)))
            for c, n in ((centre, rows), (r.peak_x, columns))
        )
        crop = np.ascontiguousarray(band.pixels[y : y + _CLOSE_UP_PX, x : x + _CLOSE_UP_PX])
        close_ups[peak] = base64.b64encode(folders.png(crop)).decode()
    return close_ups
