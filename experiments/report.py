"""Gathers the results of runs and studies into CSV files, and writes the results page from these.

python -m experiments.report --runs=DIR[,DIR...] --out=docs/results.md
python -m experiments.report --out=docs/results.md     the page again, from the CSV files in docs/results/
"""

from pathlib import Path
from typing import Any

from absl import flags

from steel_ad import cli

_RUNS = flags.DEFINE_list("runs", [], "Folders with runs and studies, at any depth; none: the CSV files stay.")
_OUT = flags.DEFINE_string(
    "out", "docs/results.md", "Page to write; CSV files and figures are in the folder of its name."
)


def main() -> None:
    from steel_ad import config as configs
    from steel_ad import recipes
    from steel_ad.research import results
    from steel_ad.research import results_page as page

    out = Path(_OUT.value)
    kinds = {"autoencoder": configs.Autoencoder, "segmentation": configs.Segmentation, "spectrum": configs.Spectrum}
    presets: dict[str, dict[str, Any]] = {
        name: {preset: kind(**settings) for preset, settings in recipes.presets(name).items()}
        for name, kind in kinds.items()
    }
    presets["transfer"] = presets["segmentation"]
    if _RUNS.value:
        page.write(out, *results.gather([Path(folder) for folder in _RUNS.value], presets))
    print(f"Results: {page.render(out)}; the numbers: {out.with_suffix('')}")


if __name__ == "__main__":
    cli.run(main)
