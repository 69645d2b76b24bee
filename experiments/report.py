"""Gathers the results of runs and studies into CSV files, and writes the results page from these.

python -m experiments.report --runs=DIR[,DIR...] --out=docs/results.md
python -m experiments.report --out=docs/results.md     the page again, from the CSV files in docs/results/
"""

from pathlib import Path

from absl import flags

from steel_ad import cli

_RUNS = flags.DEFINE_list("runs", [], "Folders with runs and studies, at any depth; none: the CSV files stay.")
_OUT = flags.DEFINE_string(
    "out", "docs/results.md", "Page to write; CSV files and figures are in the folder of its name."
)


def main() -> None:
    from steel_ad.research import results
    from steel_ad.research import results_page as page

    out = Path(_OUT.value)
    if _RUNS.value:
        page.write(out, *results.gather([Path(folder) for folder in _RUNS.value]))
    print(f"Results: {page.render(out)}; the numbers: {out.with_suffix('')}")


if __name__ == "__main__":
    cli.run(main)
