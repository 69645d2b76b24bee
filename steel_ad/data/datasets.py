"""Data sets by name or folder: good images to train on, test images with masks.

A new kind of data set is one reader here and one line in `READERS`.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, overload

import jax
import numpy as np

from steel_ad.data import folders, plates, stored
from steel_ad.data.stored import Masks, Stored
from steel_ad.errors import InputError


@dataclasses.dataclass(frozen=True)
class TestImage:
    """One test image: `image` uint8 `[h, w]`, `mask` bool `[h, w]`, `kind` "good" or the defect's name."""

    __test__ = False  # not a test case, whatever its name

    name: str
    kind: str
    image: np.ndarray
    mask: np.ndarray

    @property
    def defective(self) -> bool:
        """Whether it counts as defective; what reads a data set checks that the masks of defective kinds mark something."""
        return self.kind != "good"


class _StoredTestImage(TestImage):
    """A test image of the file `path`, which is read whenever `image` is asked for."""

    def __init__(self, name: str, kind: str, path: Path, mask: np.ndarray):
        for field, value in {"name": name, "kind": kind, "path": path, "mask": mask}.items():
            object.__setattr__(self, field, value)

    path: Path

    @property
    def image(self) -> np.ndarray:
        return folders.read_image(self.path)


def images_of(test: Sequence[TestImage]) -> Sequence[np.ndarray]:
    """The images of test images; of stored ones none is read yet."""
    paths = [t.path for t in test if isinstance(t, _StoredTestImage)]
    if test and len(paths) == len(test):
        return Stored(paths, np.array([t.mask.shape for t in test], np.int32))
    return [t.image for t in test]


class Labelled(Sequence[TestImage]):
    """Defective images and their `masks`, read whenever they are asked for where `images` are `Stored`.

    Raises:
      InputError: when it is asked for, a mask that cannot be used.
    """

    def __init__(self, images: Sequence[np.ndarray], masks: Masks, names: Sequence[str]):
        self.images, self.masks, self._names = images, masks, names

    @overload
    def __getitem__(self, index: int) -> TestImage: ...
    @overload
    def __getitem__(self, index: slice) -> list[TestImage]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return TestImage(self._names[index], "defect", self.images[index], self.mask(index))

    def __len__(self) -> int:
        return len(self._names)

    def mask(self, index: int) -> np.ndarray:
        """The mask of one image, which is not read for it: bool `[h, w]`."""
        mask = self.masks[index] > 0
        if not mask.any():
            raise InputError(f"{self.masks.paths[index]} labels no pixel of its image: remove it if the image is good")
        return mask


class _Drawn(Sequence[TestImage]):
    """Test images that are drawn when the first of them is asked for: a training run does so after its last step."""

    def __init__(self, draw: Callable[[], list[TestImage]]):
        self._draw = functools.cache(draw)

    def __getitem__(self, index):
        return self._draw()[index]

    def __len__(self) -> int:
        return len(self._draw())


@dataclasses.dataclass(frozen=True)
class Dataset:
    """`train`: good images, uint8 `[h_i, w_i]`, with a manifest row (path, bytes, sha256) each; `test` may be empty.

    `train` is a list, or `Stored` where the images stay in their files; `labelled` (defective training images) a list or, there,
    `Labelled`.
    """

    name: str
    train: Sequence[np.ndarray]
    manifest: list[dict]
    test: Sequence[TestImage]
    labelled: Sequence[TestImage] = dataclasses.field(default_factory=list)


def _folder(data: str, min_size: int, train: bool, resident: float) -> Dataset:
    root = Path(data)
    good = folders.good_images(root) if train else []
    samples = folders.samples(root)
    images = stored.read([s.image for s in samples], min_size=min_size, resident=resident)
    test = []
    for i, (sample, shape) in enumerate(zip(samples, stored.shapes(images), strict=True)):
        mask = np.zeros(shape, bool) if sample.mask is None else folders.read_mask(sample.mask, shape)
        if sample.mask is not None and not mask.any():
            raise InputError(
                f"{sample.mask} marks no pixel, but its image is among the defective ones: mark it or move the image"
            )
        test.append(_test_image(f"{sample.kind}/{sample.image.name}", sample.kind, images, i, mask))
    return Dataset(
        root.resolve().name,
        stored.read(good, min_size=min_size, resident=resident),
        folders.manifest(good, root),
        test,
    )


def _test_image(name: str, kind: str, images: Sequence[np.ndarray], i: int, mask: np.ndarray) -> TestImage:
    if isinstance(images, Stored):
        return _StoredTestImage(name, kind, images.paths[i], mask)
    return TestImage(name, kind, images[i], mask)


def _is_dagm(data: str) -> bool:
    parts = [Path(data) / part for part in ("Train", "Test")]
    return all(p.is_dir() for p in parts) and any((p / "Label").is_dir() for p in parts)


def _dagm(data: str, min_size: int, train: bool, resident: float) -> Dataset:
    """One class of DAGM 2007: `Train` and `Test` with images, `Label/<stem>_label.PNG` in each for defective ones."""
    root = Path(data)

    def part(name: str) -> tuple[list[Path], list[Path], list[Path]]:
        """Paths of the good images, the defective images, and these ones' labels."""
        labels = {}
        if (root / name / "Label").is_dir():
            # What an archive program or a person left there beside the labels is none.
            paths = folders.list_images(root / name / "Label", root=root)
            labels = {p.stem.lower().removesuffix("_label"): p for p in paths if p.stem.lower().endswith("_label")}
        images = folders.list_images(root / name, root=root)
        if alone := sorted(set(labels) - {p.stem.lower() for p in images}):
            raise InputError(
                f"{labels[alone[0]]} is a label without an image in {root / name}: add it or remove the label"
            )
        defective = [p for p in images if p.stem.lower() in labels]
        return (
            [p for p in images if p.stem.lower() not in labels],
            defective,
            [labels[p.stem.lower()] for p in defective],
        )

    def labelled(paths: list[Path], labels: list[Path], images: Sequence[np.ndarray]) -> Labelled:
        sizes = np.array(stored.shapes(images), np.int32).reshape(-1, 2)
        return Labelled(images, Masks(labels, sizes), [f"defect/{path.name}" for path in paths])

    good, defective, labels = part("Train") if train else ([], [], [])
    if train and not good:
        raise InputError(f"{root / 'Train'} has no good images: add some without a label")
    found = labelled(defective, labels, stored.read(defective, min_size=min_size, resident=resident))
    good_test, defective, labels = part("Test")
    images = stored.read(good_test + defective, min_size=min_size, resident=resident)
    masks = [np.zeros(shape, bool) for shape in stored.shapes(images[: len(good_test)])]
    marked = labelled(defective, labels, images[len(good_test) :])
    masks += [marked.mask(i) for i in range(len(marked))]
    names = [("good", path) for path in good_test] + [("defect", path) for path in defective]
    test = [_test_image(f"{kind}/{path.name}", kind, images, i, masks[i]) for i, (kind, path) in enumerate(names)]
    return Dataset(
        root.resolve().name,
        stored.read(good, min_size=min_size, resident=resident),
        folders.manifest(good, root),
        test,
        found if isinstance(found.images, Stored) else list(found),
    )


_TRAIN, _GOOD, _DEFECTIVE = 300, 60, 60


def _procedural(data: str, min_size: int, train: bool, resident: float) -> Dataset:
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

    def draw_test() -> list[TestImage]:
        good = enumerate(draw(1, _GOOD))
        test = [TestImage(f"good/{i:03d}", "good", image, np.zeros(image.shape, bool)) for i, image in good]
        kinds = line.anomalies
        most = -(-_DEFECTIVE // len(kinds))
        for k, kind in enumerate(kinds):
            num = len(range(k, _DEFECTIVE, len(kinds)))
            of_kind = jax.random.fold_in(root, 2 + k)
            drawn, masks = plates.render_defective(of_kind, line, kind, size, most, among=kinds)
            pairs = zip(np.asarray(plates.to_uint8(drawn))[:num], np.asarray(masks)[:num], strict=True)
            test += [TestImage(f"{kind}/{i:03d}", kind, image, mask) for i, (image, mask) in enumerate(pairs)]
        return test

    return Dataset(data.replace("/", "_"), list(good), manifest, _Drawn(draw_test))


READERS: dict[str, Callable[[str, int, bool, float], Dataset]] = {"procedural": _procedural}


def load(data: str, *, min_size: int = 0, train: bool = True, resident: float = math.inf) -> Dataset:
    """The data set that `data` names.

    Args:
      data: a folder in the MVTec AD layout, of one class of DAGM 2007 or of good images alone, or a name in `READERS`,
        such as "procedural/diamond".
      min_size: least height and width of every image, in pixels.
      train: whether the training images are read.
      resident: bytes of good training images, of labelled ones and of test images, above which these stay in their files (a byte
        a pixel).

    Raises:
      InputError: nothing there, or an image or mask that cannot be used.
    """
    reader = READERS.get(data.split("/", 1)[0]) if "/" in data and not Path(data).is_dir() else None
    return (reader or (_dagm if _is_dagm(data) else _folder))(data, min_size, train, resident)


class Load(Protocol):
    """`load`, or something that remembers what it has read."""

    def __call__(self, data: str, *, min_size: int = 0, resident: float = math.inf) -> Dataset: ...


def take(images: Sequence[np.ndarray], indices: np.ndarray) -> list[np.ndarray] | Stored:
    """The images of these indices; stored ones stay so."""
    return images.take(indices) if isinstance(images, Stored) else [images[i] for i in indices]


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


def uses(manifest: Sequence[dict], train: np.ndarray, validation: np.ndarray) -> list[dict]:
    """Manifest rows with a column `use`: "train", "validation" or "none"."""
    use = dict.fromkeys(train.tolist(), "train") | dict.fromkeys(validation.tolist(), "validation")
    return [{**row, "use": use.get(i, "none")} for i, row in enumerate(manifest)]
