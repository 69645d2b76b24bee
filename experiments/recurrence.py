"""Tells damaged rolls from single defects on simulated strips, a fifth of the turns missed and a fifth more defects.

python -m experiments.recurrence --out=FILE.json
"""

from pathlib import Path

from absl import flags

from steel_ad import cli

_OUT = flags.DEFINE_string("out", None, "JSON file to write.")
_STRIPS = flags.DEFINE_integer("strips", 1000, "Strips with a period, and as many without.", lower_bound=1)
_LEAST = flags.DEFINE_integer("least_turns", 8, "Turns on the shortest strip.", lower_bound=6)
_MOST = flags.DEFINE_integer("most_turns", 40, "Turns on the longest strip.", lower_bound=6)
_SAME_PLACE = flags.DEFINE_bool("same_place", False, "Further defects lie at the roll's place across, not anywhere.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the simulation.", lower_bound=0)


def main() -> None:
    from steel_ad.errors import InputError
    from steel_ad.research import simulated_rolls as recurrence

    if _MOST.value < _LEAST.value:
        raise InputError(f"--most_turns={_MOST.value} is below --least_turns={_LEAST.value}: swap them")
    found = recurrence.run(
        Path(cli.required(_OUT)),
        strips=_STRIPS.value,
        least_turns=_LEAST.value,
        most_turns=_MOST.value,
        same_place=_SAME_PLACE.value,
        seed=_SEED.value,
    )
    for name, value in found.items():
        if name != "right_by_turns":
            print(f"{name.replace('_', ' ')}: {value}")


if __name__ == "__main__":
    cli.run(main)
