"""Trains an autoencoder on good plates, calibrates a threshold on good plates, shows where the defects of test plates are.

python -m experiments.autoencoder --config=configs/autoencoder.py:quick --data=DIR --workdir=DIR
"""

from pathlib import Path

from absl import flags

from steel_ad import cli

_CONFIG = cli.define_config("configs/autoencoder.py:quick")
cli.define_processes()
_DATA = flags.DEFINE_string(
    "data", "procedural/teardrop1", "Folder in the MVTec AD layout or of good images, or procedural/LINE."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run: checkpoints, metrics, figures. Run again to resume."
)
_EVALUATE_ONLY = flags.DEFINE_bool(
    "evaluate_only", False, "Evaluate the last checkpoint in --workdir, without training."
)


def main() -> None:
    from steel_ad import config as configs
    from steel_ad.report import tables
    from steel_ad.runs import autoencoder

    config = cli.settings(_CONFIG, configs.Autoencoder)
    workdir = Path(cli.required(_WORKDIR))
    finished = (workdir / "metrics.json").exists() and not _EVALUATE_ONLY.value
    result = autoencoder.run(config, data=_DATA.value, workdir=workdir, evaluate_only=_EVALUATE_ONLY.value)
    if finished:
        print(f"The run in {workdir} was finished already.")
    if result["maps"]:
        print(tables.metrics(result["maps"]))
        print(f"Pictures: {workdir / 'figures'}; every number: {workdir / 'metrics.json'}")
    else:
        print(f"No test images in {_DATA.value}: thresholds only, in {workdir / 'metrics.json'}")


if __name__ == "__main__":
    cli.run(main)
