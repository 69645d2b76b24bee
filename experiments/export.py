"""Writes a trained model as one file that needs only jax: uint8 images in; map, score and mask out.

python -m experiments.export --model=WORKDIR --out=detector.stablehlo [--map=ssim] [--platforms=cpu,cuda,tpu]

The file is written only if, read back, it agrees with the trained model within 1e-4. docs/load_detector.py reads it. With
--out=detector.onnx it is ONNX, of one image at a time (pip install 'steel_ad[onnx]').
"""

from pathlib import Path

from absl import flags

from steel_ad import cli

_MODEL = flags.DEFINE_string("model", None, "Workdir of a run of experiments.autoencoder or experiments.segmentation.")
_OUT = flags.DEFINE_string("out", None, "File to write; a JSON file of the same name says what is in it.")
_MAP = flags.DEFINE_string("map", "", "Of an autoencoder: ssim or l2 (the run's first).")
_PLATFORMS = flags.DEFINE_list("platforms", ["cpu", "cuda", "tpu"], "Where the file can run: cpu, cuda, rocm, tpu.")
_HEIGHT = flags.DEFINE_integer("height", 0, "Of the images, in pixels; 0: for a U-Net any multiple of 16, else 256.")
_WIDTH = flags.DEFINE_integer("width", 0, "As --height.")
_THRESHOLD = flags.DEFINE_float(
    "threshold", None, "Of the mask, such as an inspection's calibrated one, in place of the training run's."
)


def main() -> None:
    from steel_ad.runs import export
    from steel_ad.runs.run import Run

    model, out = (Path(cli.required(holder)) for holder in (_MODEL, _OUT))
    record = export.run(
        Run.open(model).detector(_MAP.value),
        out,
        platforms=tuple(_PLATFORMS.value),
        height=_HEIGHT.value,
        width=_WIDTH.value,
        threshold=_THRESHOLD.value,
    )
    print(f"{out}: images {record['input']['shape']}, within {record['largest_difference']:.1g} of the trained model")
    reader = "onnxruntime" if record["format"] == "onnx" else "docs/load_detector.py"
    print(f"What is in it: {out.with_suffix('.json')}; how to read it: {reader}")


if __name__ == "__main__":
    cli.run(main)
