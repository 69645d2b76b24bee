"""Writes a trained model as one file that needs only jax: uint8 images in; map, score and mask out.

python -m experiments.export --model=WORKDIR --out=detector.stablehlo [--map=ssim] [--platforms=cpu,cuda,tpu]

The file is written only if, read back, it agrees with the trained model within 1e-4. docs/load_detector.py reads it. With
--out=detector.onnx it is ONNX, of one image at a time (pip install 'steel_ad[onnx]').
"""

from pathlib import Path

from absl import flags

from steel_ad import cli
from steel_ad import config as configs

_MODEL = cli.define_model()
_OUT = flags.DEFINE_string("out", None, "File to write; a JSON file of the same name says what is in it.")
_MAP = cli.Flags(configs.Inspection, only=("map",), title="the detector")
_SETTINGS = cli.Flags(configs.Export)


def main() -> None:
    from steel_ad.runs import export
    from steel_ad.runs.run import Run

    model, out = (Path(cli.required(holder)) for holder in (_MODEL, _OUT))
    record = export.run(_SETTINGS.value, Run.open(model).detector(_MAP.value.map), out)
    print(f"{out}: images {record['input']['shape']}, within {record['largest_difference']:.1g} of the trained model")
    reader = "onnxruntime" if record["format"] == "onnx" else "docs/load_detector.py"
    print(f"What is in it: {out.with_suffix('.json')}; how to read it: {reader}")


if __name__ == "__main__":
    cli.run(main)
