"""A library of defects: cut out of labelled images of plain steel, split by source image, resized."""

import dataclasses
import functools
import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy import ndimage

from steel_ad.data import folders
from steel_ad.errors import InputError

MIN_AREA_PX = 8
EIGHT = np.ones((3, 3), bool)

_MASK_FOLDERS = ("masks", "ground_truth")
_MERGE_PX = 6

_Window = tuple[np.ndarray, np.ndarray, np.ndarray]  # difference, cut-out and mask, as in a `Library`


class Cut(NamedTuple):
    """One defect of a library."""

    window: _Window
    kind: str
    source: str
    sha256: str  # of the source


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
    cuts: list[Cut] = []
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
        windows, refused = _windows(image, mask, size, feather_px)
        skipped += [f"{path} {reason}" for reason in refused]
        if not windows and not refused:
            skipped.append(f"{masks[key]} labels no defect of {MIN_AREA_PX} pixels or more: label it or leave it out")
        source = key[0][0] if key[0] else "defect", path.relative_to(root).as_posix(), content_hash(image)
        cuts += [Cut(found, *source) for found in windows]
    if not cuts:
        raise InputError(f"{root} has no defect that can be used; the first reason: {skipped[0]}")
    return assemble(cuts), skipped


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


def _windows(image: np.ndarray, mask: np.ndarray, size: int, feather_px: int) -> tuple[list[_Window], list[str]]:
    """The defects of an image as windows, and for each that cannot be cut out the reason, a phrase."""
    near = grown(mask)
    labels = np.where(mask, ndimage.label(near, EIGHT)[0], 0)
    found, refused = [], []
    for index, box in enumerate(ndimage.find_objects(labels), 1):
        region = labels == index
        if region.sum() < MIN_AREA_PX:
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
        found.append(window(image, image.astype(np.float32) / 255 - background, region, size, feather_px))
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


def grown(mask: np.ndarray) -> np.ndarray:
    """A mask in which regions with up to `_MERGE_PX` between them have grown together."""
    return cv2.dilate(mask.astype(np.uint8), np.ones((_MERGE_PX + 1, _MERGE_PX + 1), np.uint8)) > 0


def _distance(inside: np.ndarray) -> np.ndarray:
    """Euclidean distance to the nearest false pixel, in px."""
    return cv2.distanceTransform(inside.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)


def window(image: np.ndarray, difference: np.ndarray, region: np.ndarray, size: int, feather_px: int) -> _Window:
    """Faded difference, cut-out and mask [size, size] with the region's box in the middle."""
    (box,) = ndimage.find_objects(region.astype(np.uint8))
    start = [part.start - (size - (part.stop - part.start)) // 2 + size for part in box]
    inside = tuple(slice(first, first + size) for first in start)
    # The edge is repeated, so that a defect cut off by the image's edge fades out as well.
    difference, cutout = np.pad(difference, size, "edge")[inside], np.pad(image, size, "edge")[inside]
    mask = np.pad(region, size)[inside]
    alpha = np.clip(1 - _distance(~mask) / np.float32(feather_px + 1), 0, 1)
    return difference * alpha * alpha * (3 - 2 * alpha), cutout, mask


def content_hash(image: np.ndarray) -> str:
    """Hash of shape and grey values: one picture in two file formats is one source."""
    return hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()


def assemble(cuts: Sequence[Cut]) -> Library:
    """The library of one or more defects."""
    windows, kind, source, _ = zip(*cuts, strict=True)
    kinds, content = sorted(set(kind)), {cut.source: cut.sha256 for cut in cuts}
    sources = sorted(content)
    difference, cutout, mask = (np.stack(part) for part in zip(*windows, strict=True))
    boxes = [ndimage.find_objects(one.astype(np.uint8))[0] for one in mask]
    size = np.array([[part.stop - part.start for part in box] for box in boxes], np.int32)
    return Library(
        difference=jnp.asarray(difference),
        cutout=jnp.asarray(cutout),
        mask=jnp.asarray(mask),
        size=jnp.asarray(size),
        kind=jnp.asarray(np.searchsorted(kinds, kind).astype(np.int32)),
        source=jnp.asarray(np.searchsorted(sources, source).astype(np.int32)),
        kinds=tuple(kinds),
        sources=tuple(sources),
        sha256=tuple(content[name] for name in sources),
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
