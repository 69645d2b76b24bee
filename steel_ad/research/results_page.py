"""The results page and its figures, made of `methods.csv` and `studies.csv` alone: the same bytes from the same files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steel_ad import files
from steel_ad.report import studies as figures
from steel_ad.report import tables
from steel_ad.research import claims, results, study_rows, wording

_METHODS, _STUDIES = "methods.csv", "studies.csv"
Rows = Sequence[Mapping[str, Any]]
# Column -> header of the tables of methods; a column is left out where no method of the table has a number.
_COLUMNS = {
    "pixel_auroc": "pixel AUROC",
    "aupro_30": "AU-PRO",
    "aupimo": "AUPIMO",
    "image_auroc": "image AUROC",
    "found_fpr_05": "found at 5 % false alarms",
    "accuracy": "accuracy",
    "image_accuracy_calibrated": "accuracy, calibrated",
    "false_regions_per_image": "false regions an image",
    "test_megapixels_per_second": "Mpx/s",
    "train_seconds": "training, s",
    "parameters": "parameters",
}
_HEAD = """# Results

Written by `python -m experiments.report` from the CSV files in `{folder}/`; no number is typed by hand. To make the page again
from these files: `python -m experiments.report --out={out}`.

A cell is the median over seeds, in brackets the least and the greatest. AU-PRO is taken up to a false-positive rate of 0.3.
AUPIMO is the recall of each defect's pixels where good images have a false-positive rate of 1e-5 to 1e-4, averaged over both. "found
at 5 % false alarms" is the share of defective images with a score above all but 5 % of the good test images.
"accuracy" is the thesis' rule: an image is defective where anything is left after threshold and opening, the threshold being the
98th percentile of good residuals for an autoencoder or a detector without training, 0.5 for a network trained on defects.
"calibrated" calls an image defective where its score is above the 98th percentile of good images' scores. Of runs with another
percentile or threshold both are left out. Times are of the
machines named, some of them busy with other work. Numbers in square brackets name the command, at the end of the page.

Devices: {devices}.
"""


def write(out: Path, methods: Rows, studies: Rows) -> None:
    """The CSV files that `render` reads, in the folder named as the page; raises as `files.write_text`."""
    files.write_csv(out.with_suffix("") / _METHODS, methods, results.METHODS)
    files.write_csv(out.with_suffix("") / _STUDIES, studies, results.STUDIES)


def render(out: Path) -> Path:
    """The page and its figures.

    Args:
      out: the Markdown file; CSV files and figures are in the folder of the same name without the suffix.

    Raises:
      InputError: a CSV file is missing or damaged, or the page cannot be written.
    """
    folder = out.with_suffix("")
    methods = results.read(folder / _METHODS, results.METHODS)
    studies = results.read(folder / _STUDIES, results.STUDIES)
    commands: dict[str, int] = {}
    # A study that is no longer in the files would be left to speak for them.
    for old in (*folder.glob("study_*.png"), folder / "methods.png"):
        old.unlink(missing_ok=True)
    devices = ", ".join(sorted({row["device"] for row in (*methods, *studies) if row["device"]})) or "not recorded"
    parts = [
        _HEAD.format(folder=folder.name, out=out.name if out.is_absolute() else out.as_posix(), devices=devices),
        *_methods(methods, folder, commands),
        *_claims(methods, studies),
        *_published(methods),
        *_studies(studies, folder, commands),
        "## Commands\n\nSeeds other than the first come with `--config.seed=N`; folders are named by their last part.\n",
        *(f"{number}. `{command}`" for command, number in commands.items()),
        "",
    ]
    files.write_text(out, "\n".join(parts))
    return out


def _cited(commands: dict[str, int], *cited: str) -> str:
    """The numbers of command lines, in the order in which they come on the page, in brackets."""
    return " ".join(f"[{commands.setdefault(command, len(commands) + 1)}]" for command in cited)


def _methods(methods: Rows, folder: Path, commands: dict[str, int]) -> list[str]:
    if not methods:
        return []
    rows = [{**row, "method": wording.method(row), **_accuracies(row)} for row in methods]
    rows = sorted(rows, key=lambda row: (row["experiment"], row["method"]))
    rows = [{**row, "seedless": results.without(row, "seed")} for row in rows]
    parts = []
    drawn: dict[str, dict[str, dict[str, list[float]]]] = {}
    shown = {"pixel_auroc": "pixel AUROC", "aupro_30": "AU-PRO to FPR 0.3", "image_auroc": "image AUROC"}
    for (dataset,), of_dataset in sorted(results.series(rows, "dataset").items()):
        lines = []
        columns = {m: label for m, label in _COLUMNS.items() if any(row[m] is not None for row in of_dataset)}
        for (method, _), same in results.series(of_dataset, "method", "seedless").items():
            line = {"method": method, **{label: results.spread(same, m) for m, label in columns.items()}}
            line |= {"seeds": len({row["seed"] for row in same}), "by": _cited(commands, wording.run_command(same[0]))}
            lines.append(line)
            # Of a method with several settings the figure shows all.
            kept = drawn.setdefault(method, {}).setdefault(dataset, {m: [] for m in shown})
            for m in shown:
                kept[m] += [row[m] for row in same if row[m] is not None]
        parts.append(f"### {dataset}\n\n{tables.markdown(lines, list(lines[0]))}\n")
    title = "Methods: median over seeds and settings, bar from least to greatest"
    figures.methods(folder / "methods.png", drawn, metrics=shown, title=title)
    return [f"## Methods\n\n![Methods]({folder.name}/methods.png)\n", *parts]


def _accuracies(row: Mapping[str, Any]) -> dict[str, Any]:
    """Only where percentile and threshold are those that the page names."""
    usual = results.settings(row)["percentile"] == 98
    trained_on_defects = row["experiment"] in ("segmentation", "transfer")
    # A classifier has no map that a threshold could be of.
    whole = row["threshold"] in (None, 0.5) if trained_on_defects else usual
    return {
        "accuracy": row["image_accuracy"] if whole else None,
        "image_accuracy_calibrated": row["image_accuracy_calibrated"] if usual else None,
    }


def _claims(methods: Rows, studies: Rows) -> list[str]:
    parts = [
        "## Claims\n\nA is compared with B by one metric, run against run of the same data set, settings and seed. "
        "A claim holds on a data set where the\n95 % confidence interval of the mean difference A - B lies above minus the "
        "margin, fails where it lies below, and is open else or with\nfewer than three seeds. Where A or B is the better of "
        "several, all of them must be there; each pair's interval then has a level of\n5 % divided by the number of pairs, and "
        "the best of A is held against the best of B. Every data set is judged by itself, without a\ncorrection for their "
        "number: a claim is confirmed if it holds on each with at least three seeds, refuted if it fails on one,\nundecided "
        "else.\n"
    ]
    for claim in claims.CLAIMS:
        verdict, found = claims.judge(claim, methods, studies)
        margin = f", margin {claim.margin:g}" if claim.margin else ""
        text = f"### {claim.text}: {verdict}\n\n{claim.compared}; {claim.metric}{margin}.\n"
        lines = [
            {
                "data": j.dataset,
                "seeds": j.seeds,
                "mean A - B": f"{j.mean:+.4f}",
                "95 % interval": f"{j.low:+.4f} to {j.high:+.4f}" if j.seeds > 1 else "-",
                "": j.verdict,
            }
            for j in found
        ]
        text += "\n" + (tables.markdown(lines, list(lines[0])) if lines else "No runs to compare.") + "\n"
        parts.append(text)
    return parts


def _published(methods: Rows) -> list[str]:
    lines = [
        {
            "method": p.method,
            "published on": p.data,
            "pixel AUROC": f"{p.pixel_auroc:g}",
            "source": p.source,
            "ours, on our data": claims.ours(p, methods),
        }
        for p in claims.PUBLISHED
    ]
    return [
        "## Published figures\n\nMeasured by others on other data, which are not here: beside ours for orientation, not "
        "as a comparison. Ours: median of the data sets'\nmedians over seeds, in brackets the least and the greatest.\n",
        tables.markdown(lines, list(lines[0])) + "\n",
    ]


def _studies(studies: Rows, folder: Path, commands: dict[str, int]) -> list[str]:
    parts = []
    taken: set[str] = set()
    for (experiment, study, _), rows in results.series(studies, "experiment", "study", "base").items():
        name = f"study_{experiment}_{study}"
        while name in taken:
            name += "_"
        taken.add(name)
        figures.study(folder / f"{name}.png", **study_rows.figure(rows))
        table = study_rows.markdown(rows).partition("\n\n")[2]
        head = f"### {experiment}: {study} {_cited(commands, *wording.study_commands(rows))}"
        parts.append(f"{head}\n\n![{study}]({folder.name}/{name}.png)\n\n{table}")
    return ["## Studies\n", *parts] if parts else []
