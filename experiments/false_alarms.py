"""Shows promised against observed false alarms of detectors without training, on simulated lines.

python -m experiments.false_alarms --out=FILE.json
"""

from pathlib import Path

from absl import flags

from steel_ad import cli

_OUT = flags.DEFINE_string("out", None, "JSON file to write, with a figure beside it. Run again to resume.")
_LINES = flags.DEFINE_integer("lines", 20, "Lines.", lower_bound=2)
_FRESH = flags.DEFINE_integer("fresh", 5000, "Good plates of a line to count alarms on.", lower_bound=1)
_CALIBRATION = flags.DEFINE_integer("calibration", 2000, "Good plates, or strips, of a line to calibrate on.")
_RATES = flags.DEFINE_list("rates", ["0.05", "0.01", "0.002"], "False-alarm rates to promise.")
_MAPS = flags.DEFINE_list("maps", ["phase_only", "whitening", "lattice"], "Detectors.")
_SIZE = flags.DEFINE_integer("size", 64, "Height and width of a plate in pixels.", lower_bound=48)
_SEED = flags.DEFINE_integer("seed", 0, "Of the simulation.", lower_bound=0)


def main() -> None:
    from steel_ad.errors import InputError
    from steel_ad.report import tables
    from steel_ad.research import false_alarms

    out = Path(cli.required(_OUT))
    try:
        rates = [float(rate) for rate in _RATES.value]
    except ValueError:
        raise InputError(f"--rates={','.join(_RATES.value)} must be numbers between 0 and 1") from None
    found = false_alarms.run(
        out,
        lines=_LINES.value,
        fresh=_FRESH.value,
        calibrate=_CALIBRATION.value,
        rates=rates,
        maps=_MAPS.value,
        size=_SIZE.value,
        seed=_SEED.value,
    )
    print(tables.table(found["verdicts"], false_alarms.COLUMNS))
    print(f"Every case: {out}; figure: {out.with_suffix('.png')}")


if __name__ == "__main__":
    cli.run(main)
