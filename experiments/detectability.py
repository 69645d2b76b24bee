"""Says how small a defect an inspection will catch: probability-of-detection curves and a90/95, by kind and contrast.

python -m experiments.detectability --model=WORKDIR --calibration=FOLDER --out=DIR [--defects=FOLDER]

Defects of growing length and contrast are inserted into good plates, which are inspected at the calibrated false-alarm rate.
"""

from pathlib import Path

from absl import flags

from steel_ad import cli

_MODEL = flags.DEFINE_string("model", None, "Workdir of a run of experiments.autoencoder or experiments.segmentation.")
_CALIBRATION = flags.DEFINE_string(
    "calibration", None, "Folder of good images, one subfolder a strip: for the threshold, and to insert defects into."
)
_OUT = flags.DEFINE_string("out", None, "Folder to write.")
_DEFECTS = flags.DEFINE_string(
    "defects", "procedural", "Folder of defects on plain steel with masks, or procedural (drawn ones)."
)
_SMALLEST = flags.DEFINE_float("smallest_px", 3.0, "Length of the smallest defect, the longer side of its box, px.")
_LARGEST = flags.DEFINE_float("largest_px", 48.0, "Length of the largest defect, px.")
_CONTRASTS = flags.DEFINE_list(
    "contrasts", ["0.05", "0.1", "0.2"], "Mean absolute changes of brightness, of the full range."
)
_TRIALS = flags.DEFINE_integer("trials", 60, "Defects of each kind and contrast.")
_MAP = flags.DEFINE_string("map", "", "Of an autoencoder: ssim or l2 (the run's first).")
_TILE = flags.DEFINE_integer("tile_px", 256, "Side of a tile, the unit of calibration and of inspection, in pixels.")
_HALO = flags.DEFINE_integer("halo_px", 64, "Surroundings of a tile that the detector sees, on each side, in pixels.")
_RATE = flags.DEFINE_float("false_alarm_rate", 0.01, "Share of good tiles that may raise an alarm.")
_CONFIDENCE = flags.DEFINE_string(
    "confidence", "average", "average: the rate holds on average over calibrations; 0.95: with that confidence."
)
_SCALE = flags.DEFINE_float("mm_per_px", 0.0, "Size of a pixel on the plate (0: not known).")
_SEED = flags.DEFINE_integer("seed", 0, "Of all draws.")


def main() -> None:
    from steel_ad import config as configs
    from steel_ad.errors import InputError
    from steel_ad.report import tables
    from steel_ad.research import detectability
    from steel_ad.runs.run import Run

    try:
        contrasts = tuple(float(c) for c in _CONTRASTS.value)
        confidence = None if _CONFIDENCE.value == "average" else float(_CONFIDENCE.value)
    except ValueError as error:
        raise InputError(
            f"--contrasts takes numbers such as 0.05,0.1 and --confidence average or a number such as 0.95: {error}"
        ) from None
    model, calibrate_on, out = (cli.required(holder) for holder in (_MODEL, _CALIBRATION, _OUT))
    config = configs.Detectability(
        smallest_px=_SMALLEST.value,
        largest_px=_LARGEST.value,
        contrasts=contrasts,
        trials=_TRIALS.value,
    )
    how = configs.Inspection(
        map=_MAP.value,
        tile_px=_TILE.value,
        halo_px=_HALO.value,
        false_alarm_rate=_RATE.value,
        confidence=confidence,
        mm_per_px=_SCALE.value,
        seed=_SEED.value,
    )
    found = detectability.run(
        config,
        how,
        Run.open(Path(model)).detector(how.map),
        calibrate_on=calibrate_on,
        defects_from=_DEFECTS.value,
        out=Path(out),
    )
    print(tables.table(found["curves"], detectability.COLUMNS))
    print(f"Lengths in {found['unit']}; figure and tables: {out}")


if __name__ == "__main__":
    cli.run(main)
