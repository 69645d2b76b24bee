"""What a sweep's workdir says of its runs: `results.csv`, `table.md` and a figure a study."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from steel_ad import files
from steel_ad.report import tables
from steel_ad.research import results

# What the figures and tables show.
SHOWN = {
    "pixel_auroc": "pixel AUROC",
    "aupro_30": "AU-PRO to FPR 0.3",
    "image_auroc": "image AUROC",
    "image_accuracy": "image accuracy",
    "found_iou_30": "defects found at IoU > 0.3",
    "false_regions_per_image": "false regions an image",
}
# `settings`: as JSON, what differs from the study's; `run`: the run's folder.
COLUMNS = ("study", "axis", "value", *results.ROW, "settings", "run")
_KEY = ("study", "value", "run", "map")


class Rows:
    """The rows of `results.csv`; a row of the same run, value and map replaces the one before."""

    def __init__(self, workdir: Path):
        self._workdir = workdir
        path = workdir / "results.csv"
        self._rows: dict[tuple, dict[str, Any]] = {}
        self._places: dict[str, int] = {}
        for row in results.read(path, COLUMNS) if path.exists() else ():
            self.put(row)

    def arrange(self, folders: Iterable[Path]) -> None:
        """New runs' rows come in this order, after those that are there, whichever run is finished first."""
        runs = dict.fromkeys([*(row["run"] for row in self._rows.values()), *map(self.name, folders)])
        self._places = {run: i for i, run in enumerate(runs)}

    def name(self, folder: Path) -> str:
        """How rows name a run's folder."""
        return str(folder.relative_to(self._workdir))

    def all(self) -> list[dict[str, Any]]:
        return sorted(self._rows.values(), key=lambda row: self._places.get(row["run"], 0))

    def put(self, row: Mapping[str, Any]) -> None:
        self._rows[tuple(row[k] for k in _KEY)] = {k: row[k] for k in COLUMNS}

    def of(self, folder: Path, asked: Collection[tuple[str, str]]) -> list[dict[str, Any]]:
        """The rows of a run with these (study, value)."""
        run = self.name(folder)
        return [row for row in self.all() if row["run"] == run and (row["study"], row["value"]) in asked]

    def write(self, studies: Iterable[str]) -> None:
        """Writes all rows, the tables, and the figures of these studies."""
        from steel_ad.report import studies as figures  # not before the first run

        files.write_csv(self._workdir / "results.csv", self.all(), COLUMNS)
        files.write_text(self._workdir / "table.md", markdown(self.all()))
        for study in studies:
            if rows := [row for row in self.all() if row["study"] == study]:
                figures.study(self._workdir / f"study_{study}.png", **figure(rows))


def figure(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Arguments of `report.studies.study` for the rows of one study."""
    found: dict[tuple[str, str], dict[str, dict[str, list[float]]]] = {}
    for (dataset, name, value), same in results.series(rows, "dataset", "map", "value").items():
        numbers = {m: [row[m] for row in same if row[m] is not None] for m in SHOWN}
        found.setdefault((dataset, name), {})[value] = numbers
    seeds, axis = len({row["seed"] for row in rows}), rows[0]["axis"]
    spread = f", median and range of {seeds} seeds" if seeds > 1 and axis != "seed" else ""
    title = f"{rows[0]['experiment']}: {rows[0]['study']}{spread}"
    values = results.ordered(row["value"] for row in rows)
    return {"found": found, "values": values, "metrics": SHOWN, "axis": axis, "title": title}


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table a study: median over seeds, with the least and the greatest."""
    parts = []
    for (study,), of_study in results.series(rows, "study").items():
        lines = []
        order = results.ordered(row["value"] for row in of_study)
        for (dataset, name), of_map in results.series(of_study, "dataset", "map").items():
            of_value = results.series(of_map, "value")
            for (value,), same in sorted(of_value.items(), key=lambda item: order.index(item[0][0])):
                line: dict[str, Any] = {"data": dataset, "map": name, of_study[0]["axis"]: value}
                line |= {label: results.spread(same, m) for m, label in SHOWN.items()}
                lines.append({**line, "training, s": results.spread(same, "train_seconds"), "seeds": len(same)})
        parts.append(f"## {study}\n\n{tables.markdown(lines, list(lines[0]))}\n")
    return "\n".join(parts)
