"""The journal of an inspection: one line a band, from which an interrupted inspection goes on.

A line holds what was found in its band and everything that is needed to go on after it. It ends with a checksum of the whole
text up to there, so that a line which was changed, lost, doubled, moved or cut short is noticed.
"""

import dataclasses
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from steel_ad.errors import InputError
from steel_ad.inspection import ledger

# Close-ups as PNG in base64, by the pixel (y, x) of their region's peak.
CloseUps = dict[tuple[int, int], str]

_CHECKSUM = b', "crc32": '


class Journal:
    """The file of an inspection's lines; each is a dictionary."""

    def __init__(self, path: Path):
        self._path = path
        self._sum = 0

    def read(self, *, finished: bool = False) -> Iterator[dict[str, Any]]:
        """The lines up to the first damaged one, or only those of finished strips; the rest is removed from the file."""
        if not self._path.exists():
            return
        end, size, total = 0, 0, 0
        held: list[dict[str, Any]] = []
        with self._path.open("rb") as file:
            for line in file:
                text, _, tail = line.rpartition(_CHECKSUM)
                total = zlib.crc32(text, total)
                if tail != b"%d}\n" % total:
                    break
                record = json.loads(line)
                held.append(record)
                size += len(line)
                if record["finished"] or not finished:
                    end, self._sum = size, total
                    yield from held
                    held = []
        with self._path.open("r+b") as file:
            file.truncate(end)

    def write(self, record: dict[str, Any]) -> None:
        """Adds a line.

        Raises:
          InputError: the disk is full.
        """
        text = json.dumps(record)[:-1].encode()
        total = zlib.crc32(text, self._sum)
        try:
            with self._path.open("ab") as file:
                file.write(text + _CHECKSUM + b"%d}\n" % total)
        except OSError as error:
            raise InputError(
                f"{self._path} cannot be written ({error.strerror}): free some space, then run again to go on", status=1
            ) from None
        self._sum = total


def pending_to_json(pending: ledger.Open, close_ups: CloseUps) -> dict[str, Any]:
    """Regions that may go on in the next band, with their close-ups, for a line of the journal."""
    if not pending.regions:
        return {"width": pending.labels.size}
    edges = np.flatnonzero(np.diff(pending.labels)) + 1
    starts = np.concatenate([[0], edges]).tolist()
    return {
        "width": pending.labels.size,
        "runs": [[start, int(pending.labels[start])] for start in starts],
        "regions": [dataclasses.astuple(r) for r in pending.regions],
        "close_ups": [close_ups.get((r.peak_y, r.peak_x)) for r in pending.regions],
    }


def pending_from_json(stored: dict[str, Any]) -> tuple[ledger.Open, CloseUps]:
    """What `pending_to_json` was given."""
    if "regions" not in stored:
        return ledger.nothing(stored["width"]), {}
    labels = np.zeros(stored["width"], np.int32)
    for start, label in stored["runs"]:
        labels[start:] = label
    names = [f.name for f in dataclasses.fields(ledger.Region)]
    rows = [dict(zip(names, values, strict=True)) for values in stored["regions"]]
    regions = [ledger.Region(**{**row, "sums": tuple(row["sums"])}) for row in rows]
    close_ups = {(r.peak_y, r.peak_x): png for r, png in zip(regions, stored["close_ups"], strict=True) if png}
    return ledger.Open(tuple(regions), labels), close_ups
