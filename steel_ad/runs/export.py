"""One file to deploy: a trained detector as a compiled-anywhere program, with everything from grey values to the mask inside.

For jax, or as ONNX for programs that know nothing of jax.
"""

import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import Array

from steel_ad import config as configs
from steel_ad import files, native
from steel_ad.data import plates
from steel_ad.detectors import Detector, Fitted
from steel_ad.detectors.opened import open_maps, scaled
from steel_ad.errors import InputError
from steel_ad.runs import evaluation
from steel_ad.versions import versions

TOLERANCE = 1e-4
_SIDE_PX = 256
# uint8 [h, w] -> outputs by name
Program = Callable[[Array], dict[str, Array]]
# Height and width, px: numbers, or as jax.export.symbolic_shape takes them.
Shape = tuple[int | str, ...]


def run(config: configs.Export, fitted: Fitted, out: Path) -> dict[str, Any]:
    """Exports a trained model to `out`, and what has to be known of it to a JSON file of that name.

    A name that ends in `.onnx` is written as ONNX by jax2onnx, of one image at a time and of fixed size. The program takes
    uint8 `[b, h, w]`, any b, and returns `map` (the opened residual map, float32 `[b, h, w]`), `score` (its maximum, float32
    `[b]`), `mask` (bool `[b, h, w]`: the map above the threshold), and of a supervised model `probability` (float32 `[b]`, of
    the classification stage). It is written only if, read back, it agrees with the trained model.

    Args:
      fitted: as `Run.detector` has it.

    Returns:
      What the JSON file holds.

    Raises:
      InputError: a model or size that cannot be used, platforms without this process' own, no converter to ONNX, a file that
        does not agree or cannot be written.
    """
    onnx = out.suffix == ".onnx"
    if onnx:
        _check_onnx()
    here = jax.export.default_export_platform()
    if here not in config.platforms:
        raise InputError(f"--platforms lacks {here}, where this process runs and checks the file: add it")
    if out.suffix == ".json":
        raise InputError(f"--out={out} is the name of the JSON file beside it: use another, such as detector.stablehlo")
    threshold = fitted.threshold if config.threshold is None else config.threshold
    if threshold is None:
        raise InputError("the model has no threshold of its own, its run is not finished: give --threshold")
    shape = _shape(fitted.detector, config.height, config.width)
    if onnx:
        shape = tuple(n if isinstance(n, int) else _SIDE_PX for n in shape)
    program = _program(fitted, threshold)
    with native.suspended():  # the file is for other machines
        data = _to_onnx(program, shape) if onnx else _to_stablehlo(program, shape, config.platforms)
        made_with = versions()
    call = _from_onnx(data) if onnx else jax.jit(jax.export.deserialize(bytearray(data)).call)
    difference = check(call, fitted, threshold, shape)
    names = jax.eval_shape(program, jax.ShapeDtypeStruct((_SIDE_PX, _SIDE_PX), jnp.uint8))
    record = {
        "format": "onnx" if onnx else "stablehlo",
        "input": {"dtype": "uint8", "shape": [1 if onnx else "b", *shape]},
        "outputs": {
            "map": "float32 [b, h, w], the opened residual map",
            "score": "float32 [b], the map's maximum",
            "mask": "bool [b, h, w], map > threshold",
            **({"probability": "float32 [b], of being defective"} if "probability" in names else {}),
        },
        "map": fitted.detector.name,
        "threshold": threshold,
        "radius_px": fitted.radius,
        "platforms": None if onnx else list(config.platforms),
        "model_sha256": fitted.sha256,
        "file_sha256": hashlib.sha256(data).hexdigest(),
        "largest_difference": difference,
        "versions": made_with,
        "settings": fitted.settings,
    }
    files.write_bytes(out, data)
    files.write_json(out.with_suffix(".json"), record)
    return record


def _to_stablehlo(program: Program, shape: Shape, platforms: Sequence[str]) -> bytes:
    b, h, w = jax.export.symbolic_shape(f"b, {shape[0]}, {shape[1]}")
    # Full float32 products everywhere: accelerators would round to 10 bits or fewer, and score otherwise than the threshold knows.
    with jax.default_matmul_precision("highest"):
        exported = jax.export.export(jax.jit(jax.vmap(program)), platforms=platforms)(
            jax.ShapeDtypeStruct((b, h, w), jnp.uint8)
        )
    return bytes(exported.serialize())


def _check_onnx() -> None:
    for package in ("jax2onnx", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise InputError(
                f"ONNX needs the package {package}: pip install 'steel_ad[onnx]', or give --out=FILE.stablehlo"
            )


def _to_onnx(program: Program, shape: Shape) -> bytes:
    import jax2onnx

    names = list(jax.eval_shape(program, jax.ShapeDtypeStruct(shape, jnp.uint8)))

    # The converter has no rule for an enlargement under vmap.
    def of_one(images: Array) -> tuple[Array, ...]:
        found = program(images[0])
        return tuple(found[name][None] for name in names)

    model = jax2onnx.to_onnx(
        of_one, [jax.ShapeDtypeStruct((1, *shape), jnp.uint8)], input_names=["images"], output_names=names
    )
    return model.SerializeToString()


def _from_onnx(data: bytes) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # constants that the converter left unused
    session = onnxruntime.InferenceSession(data, options)
    names = [output.name for output in session.get_outputs()]

    def call(images: np.ndarray) -> dict[str, np.ndarray]:
        each = [session.run(names, {"images": image[None]}) for image in images]
        return {name: np.concatenate(values) for name, values in zip(names, zip(*each, strict=True), strict=True)}

    return call


def _shape(detector: Detector, height: int, width: int) -> Shape:
    """Height and width as `jax.export.symbolic_shape` takes them."""
    for name, side in (("height", height), ("width", width)):
        if side and side < detector.least_px:
            raise InputError(
                f"--{name}={side} is smaller than the detector's least image of {detector.least_px} pixels"
            )
    default = max(_SIDE_PX, detector.least_px)
    free = [f"{detector.side_multiple}*{side}" if detector.side_multiple else default for side in "hw"]
    return height or free[0], width or free[1]


def _program(fitted: Fitted, threshold: float) -> Program:
    """uint8 `[h, w]` -> the outputs that `run` lists, without their first axis."""
    # A float32 is above the threshold if it is above the greatest float32 that is not.
    limit = np.float32(threshold)
    if float(limit) > threshold:
        limit = np.nextafter(limit, np.float32(-np.inf))
    detector = fitted.detector

    def one(pixels: Array) -> dict[str, Array]:
        (_, opened, score), *_ = open_maps(detector, fitted.state, pixels, radius=fitted.radius).values()
        found = {"map": opened, "score": score, "mask": opened > limit}
        probability = detector.probability(fitted.state, scaled(pixels))
        return found if probability is None else {**found, "probability": probability}

    return one


def check(call: Callable[[np.ndarray], dict[str, Any]], fitted: Fitted, threshold: float, shape: Shape) -> float:
    """The largest difference between an exported file, read anew, and the trained model, of maps, scores and probabilities.

    Args:
      call: the file's program, uint8 `[b, h, w]` -> its outputs.
      shape: height and width of its images, as given to `jax.export.symbolic_shape`.

    Raises:
      InputError: above `TOLERANCE`, or a mask that differs where the map is not that close to the threshold.
    """
    images = _golden(shape)
    found = jax.device_get(call(images))
    mapper = evaluation.Mapper(fitted.detector, fitted.radius)
    maps, probabilities = mapper(fitted.state, list(images), label="check")
    opened = np.stack(maps[fitted.detector.name].opened)
    expected = {"map": opened, "score": maps[fitted.detector.name].scores}
    if probabilities is not None:
        expected["probability"] = probabilities
    # A NaN counts as a difference.
    largest = max(float(np.nan_to_num(np.abs(found[k] - v), nan=np.inf).max()) for k, v in expected.items())
    above = opened - np.float64(threshold)
    differs = (found["mask"] != (above > 0)) & (np.abs(above) > TOLERANCE)
    if largest > TOLERANCE or differs.any():
        raise InputError(
            f"the exported program differs from the trained model, by {largest:.2g} in its maps and in {differs.sum()} pixels "
            f"of its masks, where {TOLERANCE:g} and none are allowed: nothing was written; export with another version of jax",
            status=1,
        )
    return largest


def _golden(shape: Shape) -> np.ndarray:
    """Three procedural plates, each with a defect, uint8 `[3, h, w]`."""
    h, w = (n if isinstance(n, int) else free for n, free in zip(shape, (160, 112), strict=True))
    rendered, _ = plates.render_defective(jax.random.key(0), "teardrop1", "spot", size=_SIDE_PX, num=3)
    images = np.asarray(plates.to_uint8(rendered))
    larger = ((0, 0), (0, max(0, h - _SIDE_PX)), (0, max(0, w - _SIDE_PX)))
    return np.pad(images, larger, mode="reflect")[:, :h, :w]
