"""Shows promised against observed false alarms of detectors without training, on simulated lines.

python -m experiments.false_alarms --out=FILE.json
"""

from pathlib import Path

from absl import flags

from steel_ad import cli
from steel_ad import config as configs

_OUT = flags.DEFINE_string("out", None, "JSON file to write, with a figure beside it. Run again to resume.")
_SETTINGS = cli.Flags(configs.FalseAlarms)


def main() -> None:
    from steel_ad.report import tables
    from steel_ad.research import false_alarms

    out = Path(cli.required(_OUT))
    found = false_alarms.run(_SETTINGS.value, out)
    print(tables.table(found["verdicts"], false_alarms.COLUMNS))
    print(f"Every case: {out}; figure: {out.with_suffix('.png')}")


if __name__ == "__main__":
    cli.run(main)
