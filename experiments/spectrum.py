"""Shows the spectra of plates, reads the pattern's lattice, and finds defects without training.

python -m experiments.spectrum --data=DIR --workdir=DIR
python -m experiments.spectrum --data=procedural/teardrop1,procedural/diamond --workdir=DIR
"""

from pathlib import Path

from absl import flags

from steel_ad import cli
from steel_ad import config as configs

_CONFIG = cli.define_config(configs.Spectrum, "spectrum", "default")
_LINES = ("teardrop1", "teardrop2", "teardrop3", "teardrop4", "diamond")
_DATA = flags.DEFINE_list(
    "data",
    [f"procedural/{line}" for line in _LINES],
    "Folders in the MVTec AD layout or of good images, or procedural/LINE, comma-separated.",
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the results; of several data sets, each has a folder in it.")


def main() -> None:
    from steel_ad.report import tables
    from steel_ad.runs import spectrum

    config, workdir = _CONFIG.value, Path(cli.required(_WORKDIR))
    results = spectrum.run(config, data=_DATA.value, workdir=workdir)
    print(tables.table(spectrum.lattice_rows(results), spectrum.LATTICE_COLUMNS))
    for folder, (result, finished) in results.items():
        print()
        if finished:
            print(f"The run in {folder} was finished already.")
        if result["maps"]:
            print(f"{result['dataset']}\n{tables.metrics(result['maps'])}")
        else:
            print(f"No test images in {result['config']['data']}: thresholds only, in {folder / 'metrics.json'}")
    print(f"Pictures: {workdir / 'figures'} and, of each data set, figures beside its metrics.json")


if __name__ == "__main__":
    cli.run(main)
