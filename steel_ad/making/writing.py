"""Writes a data set so that it can be interrupted at any moment and gone on with.

What a file is made of follows from its name and the settings alone, files are written whole or not at all, and what is there is
not written again. `settings.json` keeps the settings, `manifest.csv`, written last, the SHA-256 of every file.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from steel_ad import config as configs
from steel_ad import files
from steel_ad.data import folders
from steel_ad.errors import InputError
from steel_ad.progress import progress

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Batch:
    """Images that are made together: their rows of the manifest, and what makes them, uint8 [h, w] each."""

    rows: list[Row]
    draw: Callable[[], list[np.ndarray]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A set to write: its folder, its records (file name -> JSON, or rows of a CSV file), and its images."""

    out: Path
    records: Mapping[str, Any]  # "settings.json" first
    batches: list[Batch]

    @property
    def rows(self) -> list[Row]:
        return [row for batch in self.batches for row in batch.rows]


def check(out: Path, settings: Mapping[str, Any]) -> None:
    """Clears away what a killed run had not finished writing.

    Raises:
      InputError: `out` is no folder, or holds a set of other settings or something else.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is not a folder: use another --out")
    if (out / "settings.json").exists():
        if other := configs.difference(settings, files.read_json(out / "settings.json", dict)):
            raise InputError(f"{out} holds a set made with other settings, which differs in {other}: use a new --out")
        for left in out.rglob(".*.tmp"):
            left.unlink(missing_ok=True)
    elif out.exists() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise InputError(f"{out} holds other files: use a new --out")


def complete(plans: Sequence[Plan], *, label: str = "write", unit: str = "files") -> int:
    """Writes what is missing of checked folders, and the manifests; the number of images written.

    Raises:
      InputError: a file that is not what its manifest says or, with status 1, a full disk.
    """
    paths = [plan.out / row["file"] for plan in plans for row in plan.rows]
    done, written = sum(path.exists() for path in paths), 0
    with progress(label, len(paths), unit, done=done) as update:
        for plan in plans:
            for name, content in plan.records.items():
                (files.write_csv if name.endswith(".csv") else files.write_json)(plan.out / name, content)
            for batch in plan.batches:
                if all((plan.out / row["file"]).exists() for row in batch.rows):
                    continue
                for row, image in zip(batch.rows, batch.draw(), strict=True):
                    if not (plan.out / row["file"]).exists():
                        folders.write_image(plan.out / row["file"], image)
                        written += 1
                update(done + written)
            _finish(plan)
    return written


def _finish(plan: Plan) -> None:
    """Writes the manifest, or checks the files against the one that is there."""
    path = plan.out / "manifest.csv"
    rows = [{**row, "sha256": folders.fingerprint(plan.out / row["file"])} for row in plan.rows]
    if not path.exists():
        files.write_csv(path, rows)
        return
    with files.understood(path, "delete it and run again"):
        before = {row["file"]: row["sha256"] for row in files.read_csv(path, ("file", "sha256"))}
    for row in rows:
        if before.get(row["file"]) != row["sha256"]:
            raise InputError(f"{plan.out / row['file']} is not what manifest.csv says: delete it and run again")
