"""Defects labelled on plain steel, cut out and inserted into plates with their exact masks (SPEC section 1, rows 5, 6).

    library, skipped = defects.load("strip-defects")
    train, test = defects.split(library, 0.3, seed=0)
    images, masks, labels = defects.insert(key, plates, train, probability=0.5)

A defect is kept as its cut-out and as its difference from its own background, which fades out over a few pixels around
the label. Inserting adds the difference (or pastes the cut-out) at a random place, flipped at random, on the device and
inside the jitted step. `procedural` draws a library where there are no pictures of defects.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Collection, Sequence
from pathlib import Path

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from scipy import ndimage

from steel_ad.data import folders
from steel_ad.errors import InputError

GOOD, SINGLE, PERIODIC = range(3)
BLENDS = ("difference", "paste")
AUGMENTS = ("thesis", "strong")
KINDS = ("scratch", "pit", "patch", "dent", "spot", "smear")  # that `procedural` draws

_MASK_FOLDERS = ("masks", "ground_truth")
_MERGE_PX = 6
_MIN_AREA_PX = 8
_CONTRAST = {"thesis": (1.0, 1.0), "strong": (0.5, 1.5)}
_SCALE = (0.5, 1.5)
_MARGIN_PX = 4  # that a resized defect leaves in its window, for what fades around it
_EIGHT = np.ones((3, 3), bool)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Library:
    """Cut-out defects. Arrays are pytree leaves; the names are static, so a jitted function retraces for other names.

    Each defect's bounding box lies in the middle of its `s` x `s` window, its top left corner at `(s - size) // 2`.
    """

    difference: Array  # float32 [n, s, s] in [-1, 1]: defect minus background, faded to 0 around the mask
    cutout: Array  # uint8 [n, s, s]: the source image around the defect
    mask: Array  # bool [n, s, s]: the labelled region
    size: Array  # int32 [n, 2]: height and width of the mask's bounding box, px
    kind: Array  # int32 [n]: index into `kinds`
    source: Array  # int32 [n]: index into `sources`
    kinds: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    sources: tuple[str, ...] = dataclasses.field(metadata={"static": True})  # image files, below the loaded folder
    sha256: tuple[str, ...] = dataclasses.field(metadata={"static": True})  # of each source's shape and grey values


def load(folder: str | Path, *, size: int = 128, feather_px: int = 3) -> tuple[Library, list[str]]:
    """Cuts all labelled defects out of a folder's images of plain steel.

    A mask lies beside its image as `<name>_mask.png`, or below a folder `masks` or `ground_truth` as `<name>.png` or
    `<name>_mask.png`; a folder `images` is optional. What folder remains is the defect's kind, so all of these will do:
    `images/<kind>/001.png` with `masks/<kind>/001.png`; `images/001.png` with `masks/001.png` (kind "defect");
    `<kind>/Sc_12.bmp` with `<kind>/Sc_12_mask.png`, `masks/<kind>/Sc_12.png` or `<kind>/ground_truth/Sc_12.png`.

    A defect is an 8-connected region of 8 px or more; regions with up to 6 px between them are one defect. Its
    background is the Gaussian-weighted mean of the unlabelled pixels around it, so that uneven light goes.

    Args:
      folder: where the images and masks are.
      size: the cut-outs' height and width in px; what is larger, with the feather around it, is skipped.
      feather_px: how far from the mask the difference has faded to 0.

    Returns:
      The library, and one sentence for each file or defect that was skipped: without its counterpart, damaged, with an
      empty mask or one of another size, a JPEG mask, or larger than the cut-out.

    Raises:
      InputError: no defect is left, or as `folders.list_images`.
    """
    root = Path(folder)
    images, masks, skipped = _pair(root)
    for key, path in masks.items():
        if key not in images:
            skipped.append(f"{path} is a mask without an image: add the image or remove the mask")
    cuts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    kinds: list[str] = []
    sources: list[Path] = []
    content: dict[str, str] = {}
    for key, path in images.items():
        if key not in masks:
            skipped.append(f"{path} has no mask: add {path.stem}_mask.png beside it or leave the image out")
            continue
        try:
            image = folders.read_image(path)
            mask = folders.read_mask(masks[key], image.shape)
        except InputError as error:
            skipped.append(str(error))
            continue
        content[path.relative_to(root).as_posix()] = _content(image)
        found, refused = _cut(image, mask, size, feather_px)
        skipped += [f"{path} {reason}" for reason in refused]
        if not found and not refused:
            skipped.append(f"{masks[key]} labels no defect of {_MIN_AREA_PX} pixels or more: label it or leave it out")
        cuts += found
        kinds += [key[0][0] if key[0] else "defect"] * len(found)
        sources += [path] * len(found)
    if not cuts:
        raise InputError(f"{root} has no defect that can be used; the first reason: {skipped[0]}")
    names = [path.relative_to(root).as_posix() for path in sources]
    return _library(cuts, kinds, names, content), skipped


def _content(image: np.ndarray) -> str:
    """Hash of shape and grey values: one picture in two file formats is one source."""
    return hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()


def fitting(library: Library, shape: tuple[int, int]) -> tuple[Library, list[str]]:
    """The defects that are not larger than a plate of `shape` (h, w) in px, and one sentence for each other one.

    Raises:
      InputError: none fits.
    """
    size = np.asarray(library.size)
    fits = (size <= np.asarray(shape)).all(axis=1)
    skipped = [
        f"{library.sources[library.source[i]]} has a defect of {size[i, 1]}x{size[i, 0]} pixels, "
        f"larger than the plate of {shape[1]}x{shape[0]}: use larger plates"
        for i in np.flatnonzero(~fits)
    ]
    if not fits.any():
        raise InputError(f"no defect fits into the plate; the first reason: {skipped[0]}")
    return _take(library, np.flatnonzero(fits)), skipped


def without(library: Library, sha256: Collection[str]) -> Library:
    """The defects whose source image's content is none of those.

    Raises:
      InputError: none is left.
    """
    left = ~np.isin(np.asarray(library.sha256)[np.asarray(library.source)], sorted(sha256))
    if not left.any():
        raise InputError("every defect's source image is kept for testing: add images, or test with fewer")
    return _take(library, np.flatnonzero(left))


def split(library: Library, fraction: float, seed: int) -> tuple[Library, Library]:
    """Train and test libraries with no source image in common; images of equal content count as one.

    `fraction` of each kind's source images go to the test library, but at least one where the kind has two; a kind's
    only image goes to the training library. The split does not depend on the files' names or order.

    Raises:
      InputError: there is no kind with two source images.
      ValueError: `fraction` is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be between 0 and 1, got {fraction}")
    source, kind = np.asarray(library.source), np.asarray(library.kind)
    content = np.asarray(library.sha256)[source]
    kind_of = {sha: library.kinds[k] for sha, k in sorted(zip(content.tolist(), kind.tolist(), strict=True))}
    rng = np.random.default_rng(seed)
    test: list[str] = []
    for name in sorted(set(kind_of.values())):
        group = sorted(sha for sha, of in kind_of.items() if of == name)
        count = min(max(round(fraction * len(group)), 1), len(group) - 1)
        test += [group[i] for i in rng.permutation(len(group))[:count]]
    if not test:
        raise InputError("no kind of defect has two source images, so none can be kept for testing: add images")
    in_test = np.isin(content, test)
    return _take(library, np.flatnonzero(~in_test)), _take(library, np.flatnonzero(in_test))


def check_disjoint(a: Library, b: Library) -> None:
    """Refuses two libraries that share a source image, by content.

    Raises:
      InputError: they do; it names the image in both.
    """
    names = dict(zip(b.sha256, b.sources, strict=True))
    for name, sha in zip(a.sources, a.sha256, strict=True):
        if sha in names:
            raise InputError(f"{name} and {names[sha]} are the same image, in both libraries: keep it in one of them")


def split_record(train: Library, test: Library, fraction: float, seed: int) -> dict:
    """What was split and how, for writing as JSON: for each side its sources and the number of defects by kind.

    Raises:
      InputError: as `check_disjoint`.
    """
    check_disjoint(train, test)
    record: dict = {"fraction": fraction, "seed": seed}
    for side, library in (("train", train), ("test", test)):
        counts = np.bincount(np.asarray(library.kind), minlength=len(library.kinds)).tolist()
        record[side] = {
            "defects": dict(zip(library.kinds, counts, strict=True)),
            "sources": [
                {"path": name, "sha256": sha} for name, sha in zip(library.sources, library.sha256, strict=True)
            ],
        }
    return record


def insert(
    key: Array,
    plates: Array,
    library: Library,
    *,
    max_defects: int = 1,
    probability: float = 1.0,
    blend: str = "difference",
    augment: str = "thesis",
    contrast: tuple[float, float] | None = None,
) -> tuple[Array, Array, Array]:
    """Inserts random defects at random places of plates; pure, and jitted.

    Each plate is defective with `probability`, then with 1 to `max_defects` defects, uniform over the library. A defect
    lies wholly inside the plate, uniform over all such places, flipped up-down and left-right with probability one half
    each (both together are the rotation by 180 degrees). A defect larger than the plate hangs over: see `fitting`.

    Args:
      key: a JAX PRNG key.
      plates: float32 [b, h, w] or [b, h, w, 1] in [0, 1].
      library: the defects.
      max_defects: most defects on one plate.
      probability: of a plate to be defective.
      blend: "difference" adds the defect's difference from its own background, faded around the mask; "paste" copies
        the pixels under the mask, as the thesis does.
      augment: "thesis" is the flips alone; "strong" also resizes by 0.5 to 1.5, as far as the cut-out and the plate
        have room, and has a wider `contrast`.
      contrast: range of the random factor on the difference, log-uniform; (1, 1) or, if strong, (0.5, 1.5) by default.

    Returns:
      images: float32, of the plates' shape, in [0, 1].
      masks: bool, of the plates' shape: the labelled regions.
      labels: int32 [b]: GOOD or SINGLE.

    Raises:
      ValueError: an option or the plates' shape or dtype is none of these.
    """
    if plates.dtype != jnp.float32 or not (plates.ndim == 3 or (plates.ndim == 4 and plates.shape[3] == 1)):
        raise ValueError(f"plates must be float32 [b, h, w] or [b, h, w, 1], got {plates.dtype} {list(plates.shape)}")
    if blend not in BLENDS or augment not in AUGMENTS:
        raise ValueError(f"blend must be one of {BLENDS} and augment one of {AUGMENTS}, got {blend!r} and {augment!r}")
    if max_defects < 1 or not 0 <= probability <= 1:
        raise ValueError(f"need max_defects >= 1 and a probability in 0..1, got {max_defects} and {probability}")
    contrast = _CONTRAST[augment] if contrast is None else contrast
    if not 0 < contrast[0] <= contrast[1]:
        raise ValueError(f"contrast must be a range (low, high) above 0, got {contrast}")
    images, masks, labels = _insert(
        key,
        plates.reshape(plates.shape[:3]),
        library,
        max_defects=max_defects,
        probability=probability,
        paste=blend == "paste",
        resize=augment == "strong",
        contrast=contrast,
    )
    return images.reshape(plates.shape), masks.reshape(plates.shape), labels


def insert_periodic(
    key: Array,
    strip: Array,
    library: Library,
    *,
    period_px: float,
    jitter: float = 0.01,
    fading: float = 1.0,
) -> tuple[Array, Array, Array, Array]:
    """Inserts one random defect again and again along a strip, as a damaged roll does (SPEC section 1, row 6).

    The defect has one orientation and one place across the strip; its differences are added. Mark i is at
    `first + (i + jitter * u_i) * period_px` along the strip, u_i uniform in [-1, 1], so that errors do not add up.

    Args:
      key: a JAX PRNG key.
      strip: float32 [h, w] in [0, 1]; axis 0 runs along it.
      library: the defects; those larger than the strip hang over: see `fitting`.
      period_px: the roll's circumference.
      jitter: spread of the marks' places along the strip, relative to the period, in [0, 0.5).
      fading: contrast of a mark relative to the one before, in (0, 1].

    Returns:
      strip: float32 [h, w] in [0, 1].
      mask: bool [h, w]: the labelled regions.
      positions: int32 [k, 2]: top and left of each mark's bounding box, px; (-1, -1) for a mark beyond the strip.
      labels: int32 [k]: PERIODIC, or GOOD for a mark beyond the strip; k = ceil(h / period_px), and the first is always
        on it.

    Raises:
      ValueError: an option is out of its range, or the strip is not float32 [h, w].
    """
    if strip.dtype != jnp.float32 or strip.ndim != 2:
        raise ValueError(f"strip must be float32 [h, w], got {strip.dtype} {list(strip.shape)}")
    if not (period_px >= 1 and 0 <= jitter < 0.5 and 0 < fading <= 1):
        raise ValueError(
            f"need period_px >= 1, jitter in [0, 0.5) and fading in (0, 1], got {period_px}, {jitter} and {fading}"
        )
    return _insert_periodic(key, strip, library, period_px=period_px, jitter=jitter, fading=fading)


def procedural(key: Array, num: int, *, size: int = 128, feather_px: int = 3) -> Library:
    """A library of `num` drawn defects, the `KINDS` in turn, for when there are no pictures of defects.

    Scratches: bright or dark, single or in bundles, often broken. Pits: dark inclusions drawn out along the strip, in
    rows. Patches: large dark stains of scale. Dents: bright on one side and dark on the other. Spots: small round
    stains. Smears: faint streaks. The strip runs along axis 0. The same key gives the same library on every device.

    Args:
      key: a JAX PRNG key.
      num: number of defects.
      size: the cut-outs' height and width in px, 64 or more; and with it the longest scratch.
      feather_px: as in `load`.

    Raises:
      ValueError: `num` is below 1 or `size` below 64.
    """
    if num < 1 or size < 64:
        raise ValueError(f"need num >= 1 and size >= 64, got {num} and {size}")
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
    room = size - 2 * feather_px
    cuts, kinds, names, content = [], [], [], {}
    for i in range(num):
        kind = KINDS[i % len(KINDS)]
        change, mask = _draw(rng, kind, room)
        plain = rng.uniform(0.35, 0.6) + 0.02 * _noise(rng, change.shape, 6.0, 0.7)
        image = np.round(255 * np.clip(plain + change, 0, 1)).astype(np.uint8)
        cuts.append(_window(image, change.astype(np.float32), mask, size, feather_px))
        kinds.append(kind)
        names.append(f"procedural/{kind}/{i:05d}")
        content[names[-1]] = _content(image)
    return _library(cuts, kinds, names, content)


def resized(library: Library, index: int, *, length_px: float, contrast: float) -> tuple[np.ndarray, np.ndarray]:
    """A defect of a given size and strength.

    Args:
      index: of the defect in the library.
      length_px: the longer side of its mask's bounding box, to a pixel.
      contrast: mean absolute difference under the mask, of the full range.

    Returns:
      Difference from the background float32 `[h, w]`, faded to 0 around the mask, and mask bool `[h, w]`, never empty.
    """
    difference, mask = np.asarray(library.difference[index]), np.asarray(library.mask[index])
    factor = length_px / int(np.max(library.size[index]))
    side = max(1, round(factor * len(mask)))
    how = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
    difference = cv2.resize(difference, (side, side), interpolation=how)
    cover = cv2.resize(mask.astype(np.float32), (side, side), interpolation=how)
    # Relative, since a line of one pixel, averaged, is no higher than the factor.
    mask = cover >= 0.4 * cover.max()
    strength = float(np.abs(difference[mask]).mean())
    rows, columns = ndimage.find_objects(((difference != 0) | mask).astype(np.uint8))[0]
    return difference[rows, columns] * np.float32(contrast / max(strength, 1e-6)), mask[rows, columns]


_Key = tuple[tuple[str, ...], str]


def _pair(root: Path) -> tuple[dict[_Key, Path], dict[_Key, Path], list[str]]:
    """Images and masks by what they have in common: the folders that are not their role's, and the bare name."""
    images: dict[_Key, Path] = {}
    masks: dict[_Key, Path] = {}
    skipped = []
    for path in folders.list_images(root, recursive=True):
        parents = path.relative_to(root).parts[:-1]
        bare = path.stem.removesuffix("_mask")
        is_mask = bare != path.stem or any(part in _MASK_FOLDERS for part in parents)
        key = tuple(part for part in parents if part not in (*_MASK_FOLDERS, "images")), bare
        if is_mask and path.suffix.lower() in (".jpg", ".jpeg"):
            skipped.append(f"{path} is a mask in JPEG, whose edges are not exact: save it as PNG")
            continue
        target = masks if is_mask else images
        if key in target:
            skipped.append(f"{path} has the same name as {target[key]}: rename one of them")
            continue
        target[key] = path
    return images, masks, skipped


_Cut = tuple[np.ndarray, np.ndarray, np.ndarray]


def _cut(image: np.ndarray, mask: np.ndarray, size: int, feather_px: int) -> tuple[list[_Cut], list[str]]:
    """The defects of an image as windows, and for each that cannot be cut out the reason, a phrase."""
    near = _grown(mask)
    labels = np.where(mask, ndimage.label(near, _EIGHT)[0], 0)
    found, refused = [], []
    for index, box in enumerate(ndimage.find_objects(labels), 1):
        region = labels == index
        if region.sum() < _MIN_AREA_PX:
            continue
        height, width = (part.stop - part.start for part in box)
        if max(height, width) + 2 * feather_px > size:
            refused.append(
                f"has a defect of {width}x{height} pixels, too large for cut-outs of {size}: use a larger size"
            )
            continue
        background = _background(image, region, near)
        if background is None:
            refused.append("shows no plain steel around its defect: use a larger picture of it")
            continue
        found.append(_window(image, image.astype(np.float32) / 255 - background, region, size, feather_px))
    return found, refused


def _background(image: np.ndarray, region: np.ndarray, labelled: np.ndarray) -> np.ndarray | None:
    """What the plain steel would be in a region: normalised convolution over pixels that no label is near to."""
    known = (~labelled).astype(np.float32)
    # Wide enough that the middle of the region still sees its surroundings.
    sigma = max(8.0, float(_distance(np.pad(region, 1)).max()))
    blur = functools.partial(cv2.GaussianBlur, ksize=(0, 0), sigmaX=sigma, borderType=cv2.BORDER_CONSTANT)
    weight = blur(known)
    if weight[region].min() < 1e-4:
        return None
    return blur(known * image / np.float32(255)) / np.maximum(weight, np.float32(1e-4))


def _grown(mask: np.ndarray) -> np.ndarray:
    """Regions with up to `_MERGE_PX` between them have grown together in this."""
    return cv2.dilate(mask.astype(np.uint8), np.ones((_MERGE_PX + 1, _MERGE_PX + 1), np.uint8)) > 0


def _distance(inside: np.ndarray) -> np.ndarray:
    """Euclidean distance to the nearest false pixel, in px."""
    return cv2.distanceTransform(inside.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)


def _window(image: np.ndarray, difference: np.ndarray, region: np.ndarray, size: int, feather_px: int) -> _Cut:
    """Faded difference, cut-out and mask [size, size] with the region's box in the middle."""
    (box,) = ndimage.find_objects(region.astype(np.uint8))
    start = [part.start - (size - (part.stop - part.start)) // 2 + size for part in box]
    window = tuple(slice(first, first + size) for first in start)
    # The edge is repeated, so that a defect cut off by the image's edge fades out as well.
    difference, cutout = np.pad(difference, size, "edge")[window], np.pad(image, size, "edge")[window]
    mask = np.pad(region, size)[window]
    alpha = np.clip(1 - _distance(~mask) / np.float32(feather_px + 1), 0, 1)
    return difference * alpha * alpha * (3 - 2 * alpha), cutout, mask


def _library(cuts: Sequence[_Cut], kinds: Sequence[str], names: Sequence[str], content: dict[str, str]) -> Library:
    all_kinds, all_names = tuple(sorted(set(kinds))), tuple(sorted(set(names)))
    difference, cutout, mask = (np.stack(part) for part in zip(*cuts, strict=True))
    boxes = [ndimage.find_objects(one.astype(np.uint8))[0] for one in mask]
    size = np.array([[part.stop - part.start for part in box] for box in boxes], np.int32)
    return Library(
        difference=jnp.asarray(difference),
        cutout=jnp.asarray(cutout),
        mask=jnp.asarray(mask),
        size=jnp.asarray(size),
        kind=jnp.asarray(np.array([all_kinds.index(kind) for kind in kinds], np.int32)),
        source=jnp.asarray(np.searchsorted(all_names, names).astype(np.int32)),
        kinds=all_kinds,
        sources=all_names,
        sha256=tuple(content[name] for name in all_names),
    )


def _take(library: Library, index: np.ndarray) -> Library:
    """The defects at these indices, with only their own sources; `kinds` stay, so that indices into them do."""
    used, source = np.unique(np.asarray(library.source)[index], return_inverse=True)
    taken = jax.tree.map(lambda array: jnp.asarray(np.asarray(array)[index]), library)
    return dataclasses.replace(
        taken,
        source=jnp.asarray(source.astype(np.int32)),
        sources=tuple(library.sources[i] for i in used),
        sha256=tuple(library.sha256[i] for i in used),
    )


def _box(mask: Array) -> tuple[Array, Array]:
    """Top left corner and (h, w) of a mask's bounding box, int32 [2] each; at 0 and of full size if it is empty."""

    def span(used):
        first = jnp.argmax(used)
        return first, used.shape[0] - jnp.argmax(used[::-1]) - first

    (top, height), (left, width) = span(mask.any(axis=1)), span(mask.any(axis=0))
    return jnp.stack([top, left]).astype(jnp.int32), jnp.stack([height, width]).astype(jnp.int32)


def _log_between(u: Array, low: float | Array, high: float | Array) -> Array:
    return jnp.exp(jnp.log(low) * (1 - u) + jnp.log(high) * u)


def _below(u: Array, stop: Array | int) -> Array:
    """An integer in 0..stop - 1 (0 if there is none) from a number in [0, 1)."""
    stop = jnp.asarray(stop, jnp.int32)
    return jnp.maximum(jnp.minimum((u * stop.astype(jnp.float32)).astype(jnp.int32), stop - 1), 0)


def _resize(image: Array, factor: Array) -> Array:
    """Bilinear resize about the middle of [s, s], same window; smaller than 1 averages, so that thin lines stay."""
    s = image.shape[0]
    middle = (s - 1) / 2
    at = jnp.arange(s, dtype=jnp.float32) - middle
    distance = jnp.abs(at[:, None] / factor - at[None, :])
    weights = jnp.maximum(1 - distance * jnp.minimum(factor, 1.0), 0.0)
    # Rows beyond the source see little or nothing of it, and fade.
    weights = weights / jnp.maximum(weights.sum(axis=1, keepdims=True), 0.8)
    return jnp.linalg.multi_dot([weights, image, weights.T], precision="highest")


_PICK = 4  # numbers that `_pick` takes


def _pick(u: Array, library: Library, shape: tuple[int, ...], *, resize: bool) -> tuple[Array, Array, Array, Array]:
    """The defect that `u`, uniform in [0, 1), stands for: turned and, if wanted, resized.

    Returns its difference and cut-out, float32, and mask, bool, [s, s], and int32 [2, 2]: the top left corner of the
    mask's box in the window, and the box's (h, w).
    """
    index = _below(u[0], library.mask.shape[0])
    difference, cutout, mask = library.difference[index], library.cutout[index], library.mask[index]
    cutout = cutout.astype(jnp.float32) / 255
    if resize:
        room = jnp.minimum(jnp.asarray(shape, jnp.float32), mask.shape[0] - 2.0 * _MARGIN_PX)
        largest = jnp.min(room / library.size[index].astype(jnp.float32))
        factor = _log_between(u[3], _SCALE[0], jnp.clip(largest, _SCALE[0], _SCALE[1]))
        difference, cutout = _resize(difference, factor), _resize(cutout, factor)
        # A line of one pixel, averaged, is no higher than the factor, and less between two samples.
        mask = _resize(mask.astype(jnp.float32), factor) > 0.4 * jnp.minimum(factor, 1.0)

    def turn(image):
        image = jnp.where(u[1] < 0.5, image[::-1], image)
        return jnp.where(u[2] < 0.5, image[:, ::-1], image)

    mask = turn(mask)
    return turn(difference), turn(cutout), mask, jnp.stack(_box(mask))


def _on_plate(window: Array, corner: Array, shape: tuple[int, ...]) -> Array:
    """A window [s, s] as a plate of `shape`, 0 elsewhere; `corner` is int32 [2] on the plate and may be beyond it.

    Slicing the padded window instead of writing it into the plate fuses with what follows: neither the padding nor a
    scatter is carried out, which is ten times as fast on CPU.
    """
    padded = jnp.pad(window, [(n, n) for n in shape])
    return lax.dynamic_slice(padded, jnp.asarray(shape, jnp.int32) - corner, shape)


@functools.partial(jax.jit, static_argnames=("max_defects", "paste", "resize"))
def _insert(key, plates, library, *, max_defects, probability, paste, resize, contrast):
    shape = plates.shape[1:]

    def defect(u):
        difference, cutout, mask, (corner, size) = _pick(u[3:], library, shape, resize=resize)
        corner = _below(u[:2], jnp.asarray(shape, jnp.int32) - size + 1) - corner
        return cutout if paste else _log_between(u[2], *contrast) * difference, mask, corner

    def one(of_plate, of_defects, plate):
        count = jnp.where(of_plate[0] < probability, 1 + _below(of_plate[1], max_defects), 0)
        contents, masks, corners = jax.vmap(defect)(of_defects)
        defective = jnp.zeros(shape, bool)
        for i in range(max_defects):
            mask = _on_plate(masks[i] & (i < count), corners[i], shape)
            content = _on_plate(jnp.where(i < count, contents[i], 0.0), corners[i], shape)
            plate = jnp.where(mask, content, plate) if paste else jnp.clip(plate + content, 0.0, 1.0)
            defective |= mask
        return plate, defective, jnp.where(count > 0, SINGLE, GOOD).astype(jnp.int32)

    # All from one draw: compiling many takes longer than all the rest.
    u = jax.random.uniform(key, (plates.shape[0], 2 + max_defects * (3 + _PICK)))
    return jax.vmap(one)(u[:, :2], u[:, 2:].reshape(-1, max_defects, 3 + _PICK), plates)


@functools.partial(jax.jit, static_argnames="period_px")
def _insert_periodic(key, strip, library, *, period_px, jitter, fading):
    window, count = library.mask.shape[1], math.ceil(strip.shape[0] / period_px)
    u = jax.random.uniform(key, (2 + _PICK + count,))
    difference, _, mask, (corner, size) = _pick(u[2:], library, strip.shape, resize=False)
    places = jnp.maximum(jnp.asarray(strip.shape, jnp.int32) - size + 1, 1)
    first = _below(u[:2], jnp.minimum(places, jnp.array([math.ceil(period_px), strip.shape[1]], jnp.int32)))
    last = places[0] - 1
    steps = jnp.arange(count, dtype=jnp.float32) + jitter * (2 * u[2 + _PICK :] - 1)
    top = first[0] + jnp.round(steps * period_px).astype(jnp.int32)
    top = top.at[0].set(jnp.clip(top[0], 0, last))
    seen = (top >= 0) & (top <= last)
    places = jnp.stack([top, jnp.broadcast_to(first[1], top.shape)], axis=1)

    def place(i, carry):
        image, masks = carry
        at = tuple(jnp.where(seen[i], places[i], 0) - corner + window)
        change = jnp.where(seen[i], difference * fading ** i.astype(jnp.float32), 0.0)
        changed = jnp.clip(lax.dynamic_slice(image, at, mask.shape) + change, 0.0, 1.0)
        marked = lax.dynamic_slice(masks, at, mask.shape) | (mask & seen[i])
        return lax.dynamic_update_slice(image, changed, at), lax.dynamic_update_slice(masks, marked, at)

    # Written mark by mark into the one padded strip: a pass over a whole strip for each mark would be slow.
    padded = jnp.pad(strip, window)
    image, masks = lax.fori_loop(0, count, place, (padded, jnp.zeros_like(padded, bool)))
    inner = slice(window, -window), slice(window, -window)
    labels = jnp.where(seen, PERIODIC, GOOD).astype(jnp.int32)
    return image[inner], masks[inner], jnp.where(seen[:, None], places, -1), labels


def _noise(rng: np.random.Generator, shape: tuple[int, ...], along_px: float, across_px: float) -> np.ndarray:
    """Smooth Gaussian noise of unit variance."""
    noise = ndimage.gaussian_filter(rng.standard_normal(shape), (along_px, across_px), mode="wrap")
    return noise / noise.std()


def _draw(rng: np.random.Generator, kind: str, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Change of grey level [room, room] in [-1, 1] and mask of one drawn defect, inside by a pixel or more."""
    drawers = {"scratch": _scratch, "pit": _pit, "patch": _patch, "dent": _dent, "spot": _spot, "smear": _smear}
    axis = np.arange(room) - (room - 1) / 2
    y, x = axis[:, None], axis[None, :]
    frame = np.minimum(room / 2 - np.abs(y), room / 2 - np.abs(x)) > 1
    while True:
        change, mask = drawers[kind](rng, y, x)
        mask &= frame
        labels, _ = ndimage.label(_grown(mask), _EIGHT)
        area = np.bincount(labels[mask], minlength=2)[1:]
        mask &= labels == area.argmax() + 1
        if area.max() >= 2 * _MIN_AREA_PX:
            return np.clip(change, -1, 1), mask


def _turned(rng: np.random.Generator, y: np.ndarray, x: np.ndarray, tilt: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates along and across a random direction, within `tilt` radians of the strip's."""
    angle = rng.uniform(-tilt, tilt)
    return y * np.cos(angle) + x * np.sin(angle), x * np.cos(angle) - y * np.sin(angle)


def _log(rng: np.random.Generator, low: float, high: float) -> float:
    return float(low * (high / low) ** rng.uniform())


def _scratch(rng, y, x):
    shape, change = (y.size, x.size), np.zeros((y.size, x.size))
    mask = np.zeros(shape, bool)
    tilt = 0.12 if rng.uniform() < 0.75 else np.pi / 2
    length, contrast = rng.uniform(20, y.size), _log(rng, 0.1, 0.5) * (1 if rng.uniform() < 0.8 else -1)
    along, across = _turned(rng, y, x, tilt)
    bend = rng.uniform(-0.15, 0.15) / length
    wander = 0.6 * _noise(rng, shape, 14, 14)
    for line in range(rng.choice([1, 2, 3, 5], p=[0.6, 0.2, 0.12, 0.08])):
        part = length * rng.uniform(0.6, 1)
        s = along - rng.uniform(-0.5, 0.5) * (length - part)
        inside = np.clip(1 - (2 * s / part) ** 2, 0, 1)
        width = _log(rng, 0.5, 2.2) * np.maximum(inside**0.2, 0.5)
        away = np.abs(across + bend * s**2 + wander - (rng.normal(0, 3.5) if line else 0)) / width
        broken = np.clip(1 + rng.uniform(0.1, 0.7) * _noise(rng, shape, 8, 30), 0.1, 1.6)
        change = np.maximum(change, np.exp(-0.5 * away**2) * broken * np.minimum(8 * inside, 1))
        mask |= (away < 1.8) & (inside > 0)
    return contrast * change, mask & (change > 0.08)


def _pit(rng, y, x):
    shape, inside = (y.size, x.size), np.full((y.size, x.size), -1.0)
    ragged = np.clip(_noise(rng, shape, 4, 1.5), -2, 2)
    spread = _log(rng, 4, 25)
    for _ in range(rng.integers(1, 6)):
        length, width = _log(rng, 4, 28), _log(rng, 1.5, 9)
        dy, dx = y - rng.normal(0, spread), x - rng.normal(0, 3)
        inside = np.maximum(inside, 1 + 0.25 * ragged - np.sqrt((dy / length) ** 2 + (dx / width) ** 2))
    depth = np.clip(3 * inside, 0, 1) * np.clip(0.8 + 0.25 * _noise(rng, shape, 5, 2), 0.3, 1.4)
    return -_log(rng, 0.07, 0.35) * depth, inside > 0.03


def _patch(rng, y, x):
    shape = (y.size, x.size)
    along, across = _turned(rng, y, x, 0.4)
    length, width = _log(rng, 12, 52), _log(rng, 8, 30)
    ragged = 0.35 * _noise(rng, shape, 14, 10) + 0.1 * _noise(rng, shape, 2.5, 2)
    inside = 1 + np.clip(ragged, -0.8, 0.8) - np.sqrt((along / length) ** 2 + (across / width) ** 2)
    cover = np.clip(inside * rng.uniform(3, 9), 0, 1)
    grain = 1 + rng.uniform(0.05, 0.25) * _noise(rng, shape, 2, 1) + 0.15 * _noise(rng, shape, 20, 8)
    return _log(rng, 0.08, 0.6) * (-1 if rng.uniform() < 0.85 else 0.7) * cover * grain, inside > 0.03


def _dent(rng, y, x):
    along, across = _turned(rng, y, x, np.pi)
    radius = _log(rng, 3.5, 20)
    r2 = (along**2 + (across / rng.uniform(0.5, 1)) ** 2) / radius**2
    bowl = np.maximum(1 - r2, 0) ** rng.uniform(1, 2)
    slope = np.gradient(bowl * radius)
    light = rng.uniform(-np.pi, np.pi)
    shade = np.cos(light) * slope[0] + np.sin(light) * slope[1]
    change = _log(rng, 0.08, 0.5) * (shade / np.abs(shade).max() - rng.uniform(0, 0.35) * bowl)
    return np.where(change > 0, rng.uniform(0.6, 1.2), 1) * change, r2 < 1


def _spot(rng, y, x):
    shape = (y.size, x.size)
    radius, ratio = _log(rng, 2.2, 14), rng.uniform(0.6, 1)
    along, across = _turned(rng, y, x, np.pi)
    wobble = np.clip(_noise(rng, shape, 4, 4), -2, 2)
    inside = radius * (1 + 0.15 * wobble) - np.sqrt(along**2 + (across / ratio) ** 2)
    cover = np.clip(inside / rng.uniform(1.5, 4) + 0.3, 0, 1)
    return _log(rng, 0.08, 0.5) * (-1 if rng.uniform() < 0.75 else 0.7) * cover, cover > 0.15


def _smear(rng, y, x):
    shape = (y.size, x.size)
    along, across = _turned(rng, y, x, 0.25)
    length, width = _log(rng, 15, 52), _log(rng, 4, 16)
    streaks = np.clip(_noise(rng, shape, 18, 1.8), -2, 2)
    inside = 1 + 0.15 * streaks - np.sqrt((along / length) ** 2 + (across / width) ** 2)
    cover = np.clip(inside / 0.4, 0, 1) * np.clip(0.75 + 0.3 * streaks, 0.05, 1.4)
    return _log(rng, 0.06, 0.25) * (-1 if rng.uniform() < 0.65 else 1) * cover, inside > 0.06
