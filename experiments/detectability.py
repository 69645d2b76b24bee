"""Says how small a defect an inspection will catch: probability-of-detection curves and a90/95, by kind and contrast.

python -m experiments.detectability --model=WORKDIR --calibration=FOLDER --out=DIR [--defects=FOLDER]

Defects of growing length and contrast are inserted into good plates, which are inspected at the calibrated false-alarm rate.
"""

from pathlib import Path

from absl import flags

from steel_ad import cli
from steel_ad import config as configs

_MODEL = cli.define_model()
_CALIBRATION = flags.DEFINE_string(
    "calibration", None, "Folder of good images, one subfolder a strip: for the threshold, and to insert defects into."
)
_OUT = flags.DEFINE_string("out", None, "Folder to write.")
_DEFECTS = flags.DEFINE_string(
    "defects", "procedural", "Folder of defects on plain steel with masks, or procedural (drawn ones)."
)
_TRIALS = cli.Flags(configs.Detectability, title="trials")
_HOW = cli.Flags(
    configs.Inspection,
    only=("map", "tile_px", "halo_px", "false_alarm_rate", "confidence", "mm_per_px", "seed"),
    title="the inspection",
)


def main() -> None:
    from steel_ad.report import tables
    from steel_ad.research import detectability
    from steel_ad.runs.run import Run

    model, calibrate_on, out = (cli.required(holder) for holder in (_MODEL, _CALIBRATION, _OUT))
    found = detectability.run(
        _TRIALS.value,
        _HOW.value,
        Run.open(Path(model)).detector(_HOW.value.map),
        calibrate_on=calibrate_on,
        defects_from=_DEFECTS.value,
        out=Path(out),
    )
    print(tables.table(found["curves"], detectability.COLUMNS))
    print(f"Lengths in {found['unit']}; figure and tables: {out}")


if __name__ == "__main__":
    cli.run(main)
