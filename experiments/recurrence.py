"""Tells damaged rolls from single defects on simulated strips, a fifth of the turns missed and a fifth more defects.

python -m experiments.recurrence --out=FILE.json
"""

from pathlib import Path

from absl import flags

from steel_ad import cli
from steel_ad import config as configs

_OUT = flags.DEFINE_string("out", None, "JSON file to write.")
_SETTINGS = cli.Flags(configs.SimulatedRolls)


def main() -> None:
    from steel_ad.research import simulated_rolls

    found = simulated_rolls.run(_SETTINGS.value, Path(cli.required(_OUT)))
    for name, value in found.items():
        if name != "right_by_turns":
            print(f"{name.replace('_', ' ')}: {value}")


if __name__ == "__main__":
    cli.run(main)
