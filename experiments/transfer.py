"""Pretrains on one line with defects, adapts to a line with good images only, and tests both on both (SPEC section 3).

python -m experiments.transfer --config=quick --source=DIR --target=DIR --defects=DIR --workdir=DIR
"""

from pathlib import Path

from absl import flags

from steel_ad import cli
from steel_ad import config as configs

_CONFIG = cli.define_config(configs.Segmentation, "segmentation", "quick")
_SOURCE = flags.DEFINE_string("source", "procedural/teardrop2", "Line to pretrain on: folder or procedural/LINE.")
_TARGET = flags.DEFINE_string(
    "target", "procedural/teardrop1", "Line with good images only: folder or procedural/LINE."
)
_DEFECTS = cli.define_defects()
_WORKDIR, _EVALUATE_ONLY = cli.define_run()


def main() -> None:
    from steel_ad.report import tables
    from steel_ad.runs import transfer

    config, workdir = _CONFIG.value, Path(cli.required(_WORKDIR))
    result = transfer.run(
        config,
        source=_SOURCE.value,
        target=_TARGET.value,
        defects_from=_DEFECTS.value,
        workdir=workdir,
        evaluate_only=_EVALUATE_ONLY.value,
    )
    found = {
        f"{when}, {where} line, {name}": values
        for when in ("before", "after")
        for where, evaluated in result[when].items()
        for name, values in evaluated["maps"].items()
    }
    print(tables.metrics(found))
    print(
        f"Every number: {workdir / result.get('results', '.') / 'metrics.json'}; pictures: the folders before_* and after_* beside it"
    )


if __name__ == "__main__":
    cli.run(main)
