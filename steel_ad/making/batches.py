"""Batches of files for sets with defects: good plates, and plates with defects inserted."""

import collections
import dataclasses
import functools
import hashlib
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from steel_ad.data import defects, plates
from steel_ad.errors import InputError
from steel_ad.making.writing import Batch, Row

SIZE_PX = 256  # of procedural plates
LIBRARY_SIZE_PX = 208
BATCH = 32
_PROCEDURAL_DEFECTS = 240


@dataclasses.dataclass(frozen=True)
class Plates:
    """Good plates that are made together: their names, and what makes them, uint8 [h, w] each."""

    names: list[str]
    draw: Callable[[], list[np.ndarray]]


def stream(seed: int, *names: str) -> jax.Array:
    """The key of a named stream of random numbers."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32("/".join(names).encode()))


def digest(hashes: Iterable[str]) -> str:
    """The same for the same contents, whatever the files' names and order."""
    return hashlib.sha256("".join(sorted(hashes)).encode()).hexdigest()


def spans(num: int, size: int) -> list[tuple[int, int]]:
    """First and last + 1 of each batch of `size` among `num`."""
    return [(start, min(start + size, num)) for start in range(0, num, size)]


def check_lines(lines: Sequence[str]) -> None:
    """Refuses with an InputError what is no name of a line, and an empty list."""
    for line in lines or [""]:
        if line not in plates.LINES:
            raise InputError(f"there is no line {line!r}: use {', '.join(plates.LINES)}")


def test_side(source: str, fraction: float, seed: int) -> tuple[defects.Library, dict[str, Any]]:
    """The test side of the defects, as numpy arrays, and the record of the split, with what was skipped.

    Raises:
      InputError: defects that cannot be used, or a source on both sides.
    """
    if source == "procedural":
        library = defects.procedural(jax.random.key(seed), _PROCEDURAL_DEFECTS, size=LIBRARY_SIZE_PX)
        skipped: list[str] = []
    else:
        library, skipped = defects.load(source, size=LIBRARY_SIZE_PX)
    if "good" in library.kinds:
        raise InputError(f"{source} has a kind of defect called 'good': rename its folder")
    train, test = defects.split(library, fraction, seed)
    record = {**defects.split_record(train, test, fraction, seed), "skipped": skipped}
    return jax.tree.map(np.asarray, test), record


def one(library: defects.Library, index: int) -> defects.Library:
    """The library of one of its defects."""
    return jax.tree.map(lambda array: array[index : index + 1], library)


def in_turn(library: defects.Library, seed: int, line: str = "") -> Iterator[int]:
    """Indices of defects for ever: the kinds in turn, and the defects of a kind in a random order."""
    rng = np.random.default_rng([seed, 0xDEF, zlib.crc32(line.encode())])
    of_kind = [np.flatnonzero(library.kind == k) for k in range(len(library.kinds))]
    yield from itertools.chain.from_iterable(
        zip(*(itertools.cycle(rng.permutation(group).tolist()) for group in of_kind if group.size), strict=True)
    )


def grouped(names: list[str], draw: Callable[[int, int], list[np.ndarray]]) -> list[Plates]:
    """Plates in groups of `BATCH`; `draw` makes those from its first argument to before its second."""
    return [Plates(names[a:b], functools.partial(draw, a, b)) for a, b in spans(len(names), BATCH)]


def rendered(line: str, seed: int, name: str, num: int) -> list[Plates]:
    """Plates of a line from the stream of this name."""

    def draw(start: int, stop: int) -> list[np.ndarray]:
        key = jax.random.fold_in(stream(seed, line, name), start)
        # Always as many: another number would be compiled anew.
        images = plates.render(key, line, SIZE_PX, num=BATCH)
        return list(np.asarray(plates.to_uint8(images))[: stop - start])

    return grouped([f"procedural/{line}/{name}/{i:04d}" for i in range(num)], draw)


def good(folder: str, groups: list[Plates]) -> list[Batch]:
    """The plates as files of a folder."""
    number = itertools.count()
    return [Batch([_row(f"{folder}/{next(number):04d}.png", name) for name in g.names], g.draw) for g in groups]


def inserted(
    groups: list[Plates],
    library: defects.Library,
    order: Iterator[int],
    counter: collections.Counter[str],
    key: jax.Array,
    *,
    blend: str = "difference",
    augment: str = "thesis",
) -> list[Batch]:
    """The plates, each with the next defect in `order`; `counter` has the images of each kind so far."""

    def draw(group: Plates, chosen: list[int], start: int) -> list[np.ndarray]:
        made = []
        for i, (image, index) in enumerate(zip(group.draw(), chosen, strict=True), start):
            plate, key_i = jnp.asarray(image, jnp.float32)[None] / 255, jax.random.fold_in(key, i)
            images, masks = defects.insert(key_i, plate, one(library, index), blend=blend, augment=augment)
            made += pair(images[0], masks[0])
        return made

    batches, start = [], 0
    for group in groups:
        chosen = list(itertools.islice(order, len(group.names)))
        rows = []
        for name, i in zip(group.names, chosen, strict=True):
            rows += defective(library.kinds[library.kind[i]], counter, name, library.sources[library.source[i]], i)
        batches.append(Batch(rows, functools.partial(draw, group, chosen, start)))
        start += len(chosen)
    return batches


def defective(
    kind: str, counter: collections.Counter[str], plate: str, defect: str, index: int | str = ""
) -> list[Row]:
    """Rows of the next image of a kind, after its mask: there is never an image without one."""
    name = f"{counter[kind]:04d}"
    counter[kind] += 1
    paths = mask_path(Path(f"test/{kind}/{name}.png")).as_posix(), f"test/{kind}/{name}.png"
    return [_row(path, plate, defect, index) for path in paths]


def mask_path(image: Path) -> Path:
    """Where the mask of `test/<kind>/<name>.png` is, below the same folder."""
    return Path("ground_truth", image.parent.name, f"{image.stem}_mask.png")


def pair(image: jax.Array | np.ndarray, mask: jax.Array | np.ndarray) -> list[np.ndarray]:
    """Mask and image, float [h, w] in [0, 1], as files hold them."""
    return [np.asarray(mask).astype(np.uint8) * 255, np.asarray(plates.to_uint8(image))]


def _row(file: str, plate: str, defect: str = "", index: int | str = "") -> Row:
    return {"file": file, "plate": plate, "defect": defect, "defect_index": index}
