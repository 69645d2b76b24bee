"""Varies one setting over its values, data sets and seeds: which of them matters, and how much.

python -m experiments.sweep --study=latent --data=DIR[,DIR...] --workdir=DIR [--seeds=3]
python -m experiments.sweep --study=percentile,radius,stride --data=DIR --workdir=DIR
python -m experiments.sweep --axis=batch_size --values=8,16,32 --data=DIR --workdir=DIR
"""

from pathlib import Path

from absl import flags

from steel_ad import cli
from steel_ad import config as configs

_EXPERIMENT = flags.DEFINE_enum(
    "experiment", "autoencoder", ["autoencoder", "segmentation", "transfer"], "Experiment whose settings are varied."
)
_CONFIG: cli.Flags = (
    cli.define_config(configs.Autoencoder, "autoencoder", "quick")
    if cli.early("experiment", "autoencoder") == "autoencoder"
    else cli.define_config(configs.Segmentation, "segmentation", "quick")
)
_STUDY = flags.DEFINE_list("study", [], "Studies; a wrong name lists them, and several share their runs.")
_AXIS = flags.DEFINE_string(
    "axis", "", "Setting to vary instead of a study, with --values: a number, a word, or true or false."
)
_VALUES = flags.DEFINE_list("values", [], "Values to try; by default the study's own.")
_SEEDS = flags.DEFINE_integer("seeds", 1, "Runs of each value, with seeds from --config.seed on.")
_DATA = flags.DEFINE_list(
    "data", ["procedural/teardrop1"], "Data sets: folders or procedural/LINE; of a transfer the new lines."
)
_SOURCE = flags.DEFINE_string("source", "procedural/teardrop2", "Line that a transfer pretrains on.")
_DEFECTS = cli.define_defects()
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the studies: runs, results. Run again to resume.")


def main() -> None:
    from steel_ad.research import studies, sweep

    config, experiment, workdir = _CONFIG.value, _EXPERIMENT.value, Path(cli.required(_WORKDIR))
    sweep.run(
        config,
        experiment=experiment,
        studies=studies.select(experiment, _STUDY.value, _AXIS.value, _VALUES.value),
        data=_DATA.value,
        workdir=workdir,
        seeds=_SEEDS.value,
        source=_SOURCE.value if experiment == "transfer" else "",
        defects_from=_DEFECTS.value,
    )
    print((workdir / "table.md").read_text(encoding="utf-8"))
    print(f"Figures and every number: {workdir}")


if __name__ == "__main__":
    cli.run(main)
