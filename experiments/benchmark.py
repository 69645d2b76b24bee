"""Times this project's works and other people's implementations of them; tables, JSON and a roofline picture.

python -m experiments.benchmark --only=ssim,train --out=FILE.json
"""

from pathlib import Path

from absl import flags

from steel_ad import cli

_ONLY = flags.DEFINE_list("only", [], "Groups and works, comma-separated; none: all.")
_IMPL = flags.DEFINE_list("impl", [], "Implementations, comma-separated, as steel_ad,torch_eager_nchw; none: all.")
_OUT = flags.DEFINE_string(
    "out", "runs/benchmark.json", "JSON to write; a roofline picture, FILE.png, goes next to it."
)
_REPEATS = flags.DEFINE_integer("repeats", 10, "Blocks of each implementation of a work.")
_BUDGET_S = flags.DEFINE_float(
    "budget_s", 60.0, "Seconds an implementation may spend on one work, beyond three blocks."
)
_TINY = flags.DEFINE_bool("tiny", False, "Minute sizes, without PyTorch: a check that everything runs.")
_COMPARE = flags.DEFINE_string("compare", None, "JSON of an earlier run: prints what has changed.")


def main() -> None:
    from steel_ad import benchmark

    benchmark.run(
        only=_ONLY.value,
        impl=_IMPL.value,
        out=Path(_OUT.value),
        repeats=_REPEATS.value,
        budget_s=_BUDGET_S.value,
        tiny=_TINY.value,
        compare=Path(_COMPARE.value) if _COMPARE.value else None,
    )


if __name__ == "__main__":
    cli.run(main, interrupted="--out holds the works that were done, and the same command begins again")
