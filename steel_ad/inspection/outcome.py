"""What an inspection writes: the ledger, close-ups, figures, the report and the summary."""

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from steel_ad import config as configs
from steel_ad import files
from steel_ad.inspection import coil, drift, good_tiles, ledger
from steel_ad.inspection.course import Findings
from steel_ad.inspection.good_tiles import Reference
from steel_ad.inspection.strips import Strip
from steel_ad.versions import versions

# Rows in the report's table.
_LISTED = 2000
# What a binary prints of a finished inspection.
_SUMMARY = {
    **dict.fromkeys(("defects", "tiles", "tiles_with_an_alarm"), int),
    "calibration": dict,
    "recurrence": [{"side": str, "sentence": str}],
    "unread": [str],
    "watched?": {"waiting": [str]},
}


def write(
    config: configs.Inspection,
    strips: Sequence[Strip],
    findings: Findings,
    reference: Reference,
    settings: Mapping[str, Any],
    seconds: float,
    out: Path,
    *,
    watched: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes `ledger.csv`, `ledger.jsonl`, `close_ups/`, `coil_map.png`, `scores.png`, `report.html` and `summary.json`.

    Args:
      settings: all that the result depends on, for the report.
      seconds: that inspecting has taken since this start.
      watched: of a watched folder, its number of images, whether the inspection has ended, and the names that wait.

    Returns:
      What `summary.json` holds.
    """
    numbered = [{**row, "index": i} for i, row in enumerate(findings.rows)]
    rows = ledger.ordered(ledger.deduplicated(numbered, [s.camera for s in strips]))
    close_ups = {}
    for row in rows:
        if (stored := findings.close_ups.get(row.pop("index"))) is not None:
            close_ups[row["defect"]] = base64.b64decode(stored)
    rolls = coil.rolls(config, strips, findings.sizes, rows)
    scores = np.array(findings.scores)
    summary = {
        "defects": len(rows),
        "tiles": len(scores),
        "tiles_with_an_alarm": int(np.count_nonzero(scores > reference.threshold)),
        "threshold": reference.threshold,
        "calibration": reference.record,
        "recurrence": rolls,
        "unread": findings.unread,
        "drift": [str(m) for m in drift.history(findings.quantities, reference.good)] if reference.good else None,
        "megapixels": sum(h * w for h, w in findings.sizes.values()) / 1e6,
        "megapixels_per_second": findings.inspected_px / 1e6 / seconds if seconds > 0 else None,
        **({"watched": watched} if watched else {}),
        "settings": settings,
        "versions": versions(),
    }
    columns = list(rows[0]) if rows else ["defect", *ledger.COLUMNS]
    files.write_csv(out / "ledger.csv", rows, columns)
    files.write_text(out / "ledger.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    for defect, png in close_ups.items():
        files.write_bytes(out / "close_ups" / f"{defect:06d}.png", png)
    for old in (out / "close_ups").glob("*.png") if watched else ():
        # Numbers change as rows come.
        if int(old.stem) not in close_ups:
            old.unlink()
    # A name that is not UTF-8 cannot be drawn.
    name = Path(settings["source"]).name.encode("utf-8", "backslashreplace").decode()
    sides, unit = coil.sides(strips, findings.sizes, rows, rolls)
    pictures = _pictures(out, sides, unit, scores, reference, title=f"{name}: {_counted(rows)}")
    _write_report(out / "report.html", f"Inspection of {name}", summary, rows, close_ups, pictures)
    # Last, since its presence says that the inspection is complete.
    files.write_json(out / "summary.json", summary)
    return summary


def finished(path: Path) -> dict[str, Any]:
    """The summary of a finished inspection.

    Raises:
      InputError: it is damaged.
    """
    summary = files.read_json(path, dict)
    with files.understood(path, "delete it and run again"):
        files.check(summary, _SUMMARY)
        good_tiles.check_promise(summary["calibration"])
    return summary


def _counted(rows: Sequence[Any]) -> str:
    return f"{len(rows)} defect{'s' * (len(rows) != 1)}"


def _pictures(
    out: Path, sides: Sequence[Any], unit: str, scores: np.ndarray, reference: Reference, *, title: str
) -> list[tuple[str, bytes]]:
    """Draws the figures of the report; returns them with their headings."""
    from steel_ad.report import coils, evaluation

    calibrated = reference.scores.size > 0
    coil_map = coils.coil_map(out / "coil_map.png", sides, unit=unit, title=title)
    histogram = evaluation.score_histogram(
        out / "scores.png",
        reference.scores if calibrated else scores,
        {"inspected": scores} if calibrated else {},
        threshold=reference.threshold,
        of="tile",
        title="tile scores" + (" of calibration (above) and inspection" if calibrated else ""),
    )
    return [("Where the defects lie", coil_map.read_bytes()), ("Tile scores", histogram.read_bytes())]


def _write_report(
    path: Path,
    title: str,
    summary: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    close_ups: Mapping[int, bytes],
    pictures: Sequence[tuple[str, bytes]],
) -> None:
    from steel_ad.report import inspection_page

    tiles, unread = summary["tiles"], summary["unread"]
    where = f"{_counted(rows)} in {summary['tiles_with_an_alarm']} of {tiles} tiles."
    verdict = where if rows else f"Clean: no defect in {tiles} tiles."
    note = f"The {_LISTED} highest peaks of {len(rows)} are listed; all are in ledger.csv."
    page = inspection_page.inspection(
        title=title,
        verdict=" ".join([verdict, *(f"Not all was inspected: {sentence}." for sentence in unread)]),
        clean=not rows and not unread,
        facts=[*_facts(summary), *((k, str(v)) for k, v in summary["settings"].items())],
        pictures=pictures,
        rows=sorted(rows, key=lambda r: -r["peak"])[:_LISTED],
        close_ups=close_ups,
        note=note if len(rows) > _LISTED else "",
    )
    files.write_text(path, page)


def _facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values of what a reader of the report must know of how the inspection was made."""
    facts = [
        ("promise", good_tiles.promise_sentence(summary["calibration"])),
        ("threshold", f"{summary['threshold']:.6g}"),
    ]
    if watched := summary.get("watched"):
        state = "ended" if watched["ended"] else "still going on when this was written"
        waiting = f"; not inspected yet: {', '.join(watched['waiting'])}" if watched["waiting"] else ""
        facts.append(("watched", f"{watched['images']} images, {state}{waiting}"))
    if not summary["settings"]["training_finished"]:
        facts.append(("training", "The model's training run is not finished: this is its newest checkpoint."))
    facts += [(f"recurrence, {roll['side']}", roll["sentence"]) for roll in summary["recurrence"]]
    facts += [("drift", sentence) for sentence in summary["drift"] or ()]
    if summary["megapixels_per_second"] is not None:
        facts.append(("inspected", f"{summary['megapixels']:.2f} Mpx, {summary['megapixels_per_second']:.2f} Mpx/s"))
    return [*facts, ("versions", ", ".join(f"{k} {v}" for k, v in summary["versions"].items()))]
