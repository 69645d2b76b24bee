"""Trains an autoencoder on good plates, calibrates a threshold on good plates, shows where the defects of test plates are.

python -m experiments.autoencoder --config=quick --data=DIR --workdir=DIR
"""

from pathlib import Path

from absl import flags

from steel_ad import cli
from steel_ad import config as configs

_CONFIG = cli.define_config(configs.Autoencoder, "autoencoder", "quick")
_DATA = flags.DEFINE_string(
    "data", "procedural/teardrop1", "Folder in the MVTec AD layout or of good images, or procedural/LINE."
)
_WORKDIR, _EVALUATE_ONLY = cli.define_run()


def main() -> None:
    from steel_ad.report import tables
    from steel_ad.runs import autoencoder

    config, workdir = _CONFIG.value, Path(cli.required(_WORKDIR))
    finished = (workdir / "metrics.json").exists() and not _EVALUATE_ONLY.value
    result = autoencoder.run(config, data=_DATA.value, workdir=workdir, evaluate_only=_EVALUATE_ONLY.value)
    if finished:
        print(f"The run in {workdir} was finished already.")
    where = workdir / result.get("results", ".")
    if result["maps"]:
        print(tables.metrics(result["maps"]))
        print(f"Pictures: {where / 'figures'}; every number: {where / 'metrics.json'}")
    else:
        print(f"No test images in {_DATA.value}: thresholds only, in {where / 'metrics.json'}")


if __name__ == "__main__":
    cli.run(main)
