"""Trains CompactCNN or U-Net and its classification stage on a line's good plates with inserted defects, and tests both.

python -m experiments.segmentation --config=quick --data=DIR --defects=DIR --workdir=DIR
"""

from pathlib import Path

from absl import flags

from steel_ad import cli
from steel_ad import config as configs

_CONFIG = cli.define_config(configs.Segmentation, "segmentation", "quick")
_DATA = flags.DEFINE_string(
    "data", "procedural/teardrop1", "Folder in the MVTec AD or DAGM layout, or procedural/LINE."
)
_DEFECTS = cli.define_defects()
_WORKDIR, _EVALUATE_ONLY = cli.define_run()
_BESIDE = flags.DEFINE_list("beside", [], "Workdirs of other models on the same data, drawn beside this one's maps.")


def main() -> None:
    from steel_ad.report import tables
    from steel_ad.runs import segmentation

    config, workdir = _CONFIG.value, Path(cli.required(_WORKDIR))
    finished = (workdir / "metrics.json").exists() and not _EVALUATE_ONLY.value
    result = segmentation.run(
        config,
        data=_DATA.value,
        defects_from=_DEFECTS.value,
        workdir=workdir,
        evaluate_only=_EVALUATE_ONLY.value,
    )
    if finished:
        print(f"The run in {workdir} was finished already.")
    print(tables.metrics(result["maps"]) if result["maps"] else f"No test images in {_DATA.value}.")
    if _BESIDE.value:
        print(f"Side by side: {segmentation.predictions([workdir, *map(Path, _BESIDE.value)])}")
    where = workdir / result.get("results", ".")
    print(f"Pictures: {where / 'figures'}; every number: {where / 'metrics.json'}")


if __name__ == "__main__":
    cli.run(main)
