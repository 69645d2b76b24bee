"""Data sets by name or folder: good images to train on, test images with masks.

A new layout of folders is one function here and one line in `LAYOUTS`.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import jax
import numpy as np

from steel_ad.data import folders, images, plates
from steel_ad.data.images import Images, Later, made
from steel_ad.errors import InputError


class TestImage:
    """One test image: `image` uint8 `[h, w]`, `mask` bool `[h, w]`, `kind` "good" or the defect's name.

    `image` and `mask` may be given as `Later`, and are then made whenever they are asked for.
    """

    __test__ = False  # not a test case, whatever its name

    def __init__(self, name: str, kind: str, image: np.ndarray | Later, mask: np.ndarray | Later):
        self.name, self.kind, self._image, self._mask = name, kind, image, mask

    @property
    def image(self) -> np.ndarray:
        return made(self._image)

    @property
    def mask(self) -> np.ndarray:
        return made(self._mask).astype(bool, copy=False)

    @property
    def defective(self) -> bool:
        """Whether it counts as defective; what reads a data set checks that the masks of defective kinds mark something."""
        return self.kind != "good"


def images_of(test: Sequence[TestImage]) -> Images:
    """The images of test images; none is read."""
    return Images([t._image for t in test])


def masks_of(test: Sequence[TestImage]) -> Images:
    """The masks of test images, uint8, 0 and 1; none is read."""
    return Images([m if isinstance(m, Later) else m.astype(np.uint8) for m in (t._mask for t in test)])


@dataclasses.dataclass(frozen=True)
class Dataset:
    """`train`: good images, with a manifest row (path, bytes, sha256) each; `test` and `labelled` (defective training images)
    may be empty."""

    name: str
    train: Images
    manifest: list[dict]
    test: Sequence[TestImage]
    labelled: Sequence[TestImage] = ()


class Layout(NamedTuple):
    """`recognises`: whether `data` names a data set of this layout; `read`: with `load`'s arguments, all by name, reads it."""

    recognises: Callable[[str], bool]
    read: Callable[..., Dataset]


def _folder(data: str, *, min_size: int, train: bool, resident: float) -> Dataset:
    """A folder in the MVTec AD layout, or of good images alone."""
    root = Path(data)
    good = folders.good_images(root) if train else []
    samples = folders.samples(root)
    tested = images.read([s.image for s in samples], min_size=min_size, resident=resident)
    unmarked = "marks no pixel, but its image is among the defective ones: mark it or move the image"
    test = []
    for sample, item in zip(samples, tested.items, strict=True):
        mask = np.zeros(item.shape, bool)
        if sample.mask is not None:
            mask = images.read_mask(sample.mask, item.shape, unmarked).astype(bool)
        test.append(TestImage(f"{sample.kind}/{sample.image.name}", sample.kind, item, mask))
    return Dataset(
        root.resolve().name,
        images.read(good, min_size=min_size, resident=resident),
        folders.manifest(good, root),
        test,
    )


def _is_dagm(data: str) -> bool:
    parts = [Path(data) / part for part in ("Train", "Test")]
    return all(p.is_dir() for p in parts) and any((p / "Label").is_dir() for p in parts)


def _dagm(data: str, *, min_size: int, train: bool, resident: float) -> Dataset:
    """One class of DAGM 2007: `Train` and `Test` with images, `Label/<stem>_label.PNG` in each for defective ones."""
    root = Path(data)

    def part(name: str) -> tuple[list[Path], list[Path], list[Path]]:
        """Paths of the good images, the defective images, and these ones' labels."""
        labels = {}
        if (root / name / "Label").is_dir():
            # What an archive program or a person left there beside the labels is none.
            paths = folders.list_images(root / name / "Label", root=root)
            labels = {p.stem.lower().removesuffix("_label"): p for p in paths if p.stem.lower().endswith("_label")}
        found = folders.list_images(root / name, root=root)
        if alone := sorted(set(labels) - {p.stem.lower() for p in found}):
            raise InputError(
                f"{labels[alone[0]]} is a label without an image in {root / name}: add it or remove the label"
            )
        good, defective = ([p for p in found if (p.stem.lower() in labels) == marked] for marked in (False, True))
        return good, defective, [labels[p.stem.lower()] for p in defective]

    def marked(
        paths: list[Path], labels: list[Path], items: Sequence[np.ndarray | Later], later: bool
    ) -> list[TestImage]:
        found = []
        for path, label, item in zip(paths, labels, items, strict=True):
            unmarked = "labels no pixel of its image: remove it if the image is good"
            mask = functools.partial(images.read_mask, label, item.shape, unmarked)
            found.append(TestImage(f"defect/{path.name}", "defect", item, Later(item.shape, mask) if later else mask()))
        return found

    good, defective, labels = part("Train") if train else ([], [], [])
    if train and not good:
        raise InputError(f"{root / 'Train'} has no good images: add some without a label")
    read = functools.partial(images.read, min_size=min_size, resident=resident)
    found = read(defective)
    labelled = marked(defective, labels, found.items, found.stored)
    good_test, defective, labels = part("Test")
    items = read(good_test + defective).items
    test = [
        TestImage(f"good/{path.name}", "good", item, np.zeros(item.shape, bool))
        for path, item in zip(good_test, items, strict=False)
    ]
    test += marked(defective, labels, items[len(good_test) :], False)
    return Dataset(root.resolve().name, read(good), folders.manifest(good, root), test, labelled)


_TRAIN, _GOOD, _DEFECTIVE = 300, 60, 60


def _procedural(data: str, *, min_size: int, train: bool, resident: float) -> Dataset:
    """300 good plates of a line to train, 60 good and 60 defective ones to test, always the same ones.

    `data` is "procedural/LINE", of 256x256 pixels, or "procedural/LINE/SIDE".
    """
    _, name, *side = data.split("/")
    if name not in plates.LINES:
        raise InputError(f"there is no line {data!r}: use one of {', '.join('procedural/' + n for n in plates.LINES)}")
    if side and not (len(side) == 1 and side[0].isdecimal() and int(side[0]) >= 128):
        raise InputError(f"{data} must be procedural/LINE or procedural/LINE/SIDE with SIDE at least 128 pixels")
    size = int(side[0]) if side else 256
    if min_size > size:
        raise InputError(
            f"{data} has plates of {size}x{size} pixels, smaller than the patch of {min_size}: use a smaller "
            f"--config.patch_size, or --data=procedural/{name}/{min_size}"
        )
    if resident < 0:
        raise InputError(f"{data} is drawn, not read from files: leave --config.data_path at auto")
    line = plates.LINES[name]
    root = jax.random.key(20)

    def draw(stream, num):
        return np.asarray(plates.to_uint8(plates.render(jax.random.fold_in(root, stream), line, size, num)))

    good = draw(0, _TRAIN) if train else np.zeros((0, size, size), np.uint8)
    manifest = [
        {"path": f"{data}/train/{i:04d}", "bytes": image.nbytes, "sha256": hashlib.sha256(image.tobytes()).hexdigest()}
        for i, image in enumerate(good)
    ]

    kinds = line.anomalies
    most = -(-_DEFECTIVE // len(kinds))

    @functools.cache
    def tested(kind: str) -> tuple[np.ndarray, np.ndarray]:
        if kind == "good":
            return draw(1, _GOOD), np.zeros((_GOOD, size, size), bool)
        of_kind = jax.random.fold_in(root, 2 + kinds.index(kind))
        drawn, masks = plates.render_defective(of_kind, line, kind, size, most, among=kinds)
        return np.asarray(plates.to_uint8(drawn)), np.asarray(masks)

    def later(kind: str, which: int, i: int) -> Later:
        return Later((size, size), lambda: tested(kind)[which][i])

    counts = {"good": _GOOD} | {kind: len(range(k, _DEFECTIVE, len(kinds))) for k, kind in enumerate(kinds)}
    # Drawn when the first of a kind is asked for: a training run does so after its last step.
    test = [
        TestImage(f"{kind}/{i:03d}", kind, later(kind, 0, i), later(kind, 1, i))
        for kind, count in counts.items()
        for i in range(count)
    ]
    return Dataset(data.replace("/", "_"), Images(list(good)), manifest, test)


# The first that recognises a data set reads it; the last one takes what no other does.
LAYOUTS = {
    "procedural": Layout(lambda data: data.startswith("procedural/") and not Path(data).is_dir(), _procedural),
    "dagm": Layout(_is_dagm, _dagm),
    "folder": Layout(lambda data: True, _folder),
}


def load(data: str, *, min_size: int = 0, train: bool = True, resident: float = math.inf) -> Dataset:
    """The data set that `data` names.

    Args:
      data: a folder in the MVTec AD layout, of one class of DAGM 2007 or of good images alone, or "procedural/LINE", such as
        "procedural/diamond".
      min_size: least height and width of every image, in pixels.
      train: whether the training images are read.
      resident: bytes of good training images, of labelled ones and of test images, above which these stay in their files (a byte
        a pixel).

    Raises:
      InputError: nothing there, or an image or mask that cannot be used.
    """
    layout = next(layout for layout in LAYOUTS.values() if layout.recognises(data))
    return layout.read(data, min_size=min_size, train=train, resident=resident)


class Load(Protocol):
    """`load`, or something that remembers what it has read."""

    def __call__(self, data: str, *, min_size: int = 0, resident: float = math.inf) -> Dataset: ...


def chosen(indices: np.ndarray, count: int, seed: int) -> np.ndarray:
    """`count` of the training images' indices, sorted; 0: all. Fewer are always among more, for the same seed.

    Raises:
      InputError: there are not so many.
    """
    if count > len(indices):
        raise InputError(f"--config.train_images={count}, but there are only {len(indices)} images to train on")
    if not count:
        return indices
    return np.sort(np.random.default_rng([seed, 0xF3]).permutation(indices)[:count])


def split(count: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of training and of validation images, sorted, disjoint, together all; the same for the same arguments.

    Raises:
      InputError: too few images for one of each.
    """
    held_out = max(1, round(count * fraction))
    if count - held_out < 1:
        raise InputError(f"{count} good image(s) cannot be split into training and validation: give at least 2")
    order = np.random.default_rng([seed, 0x5EED]).permutation(count)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


@dataclasses.dataclass(frozen=True)
class Line:
    """A line's data set; of its good images those to train on and those to calibrate with; `manifest`: the data set's, with a
    column `use`, "train", "validation" or "none"."""

    dataset: Dataset
    training: Images
    validation: Images
    manifest: list[dict]


def divided(dataset: Dataset, fraction: float, seed: int, count: int = 0) -> Line:
    """The data set with its good images divided by `split`, and of those to train on `count` `chosen`; raises as both."""
    train, validation = split(len(dataset.train), fraction, seed)
    train = chosen(train, count, seed)
    use = dict.fromkeys(train.tolist(), "train") | dict.fromkeys(validation.tolist(), "validation")
    manifest = [{**row, "use": use.get(i, "none")} for i, row in enumerate(dataset.manifest)]
    return Line(dataset, dataset.train.take(train), dataset.train.take(validation), manifest)
