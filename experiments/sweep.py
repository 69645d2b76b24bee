"""Varies one setting over its values, data sets and seeds: which of them matters, and how much.

python -m experiments.sweep --study=latent --data=DIR[,DIR...] --workdir=DIR [--seeds=3]
python -m experiments.sweep --study=percentile,radius,stride --data=DIR --workdir=DIR
python -m experiments.sweep --axis=batch_size --values=8,16,32 --data=DIR --workdir=DIR
"""

from pathlib import Path

from absl import flags

from steel_ad import cli

_EXPERIMENT = flags.DEFINE_enum(
    "experiment", "autoencoder", ["autoencoder", "segmentation", "transfer"], "Whose settings are varied."
)
_CONFIG = cli.define_config(
    "configs/autoencoder.py:quick"
    if cli.early("experiment", "autoencoder") == "autoencoder"
    else "configs/segmentation.py:quick"
)
_STUDY = flags.DEFINE_list("study", [], "Studies, whose names a wrong one lists; several share their runs.")
_AXIS = flags.DEFINE_string("axis", "", "Instead of a study: a number, word or yes/no of the config, with --values.")
_VALUES = flags.DEFINE_list("values", [], "Values to try; by default the study's own.")
_SEEDS = flags.DEFINE_integer("seeds", 1, "Runs of each value, with seeds from --config.seed on.")
_DATA = flags.DEFINE_list(
    "data", ["procedural/teardrop1"], "Data sets: folders or procedural/LINE; of a transfer the new lines."
)
_SOURCE = flags.DEFINE_string("source", "procedural/teardrop2", "Of a transfer: the line to pretrain on.")
_DEFECTS = flags.DEFINE_string(
    "defects", "", "Of the supervised experiments: folder of defects, procedural, or labelled."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the studies: runs, results. Run again to resume.")


def main() -> None:
    from steel_ad.research import sweep

    experiment, workdir = _EXPERIMENT.value, Path(cli.required(_WORKDIR))
    sweep.run(
        cli.settings(_CONFIG, sweep.KINDS[experiment]),
        experiment=experiment,
        studies=sweep.select(experiment, _STUDY.value, _AXIS.value, _VALUES.value),
        data=_DATA.value,
        workdir=workdir,
        seeds=_SEEDS.value,
        source=_SOURCE.value if experiment == "transfer" else "",
        defects_from=_DEFECTS.value,
        command=cli.command("sweep"),
    )
    print((workdir / "table.md").read_text(encoding="utf-8"))
    print(f"Figures and every number: {workdir}")


if __name__ == "__main__":
    cli.run(main)
