"""Images in from folders, checked so that a damaged file ends in one sentence instead of a half-grey plate."""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from steel_ad import files
from steel_ad.data import formats
from steel_ad.data.formats import Refused
from steel_ad.errors import InputError

IMAGE_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".jpg", ".jpeg")

_UNDECODABLE = "cannot be decoded, it is damaged or of an unusual kind: copy it again or save it as a plain PNG"


@dataclass(frozen=True)
class Sample:
    """One test image: `kind` is "good" or the defect's name; `mask` is None exactly for good ones."""

    image: Path
    kind: str
    mask: Path | None


def read_image(path: str | Path, *, max_pixels: int = 2**28) -> np.ndarray:
    """Reads a PNG, BMP, TIFF or JPEG file, told apart by content, as grey uint8 [h, w] in 0..255.

    - 16 bit is scaled by its full range, round(value / 257): 12-bit data in a 16-bit file comes out dark.
    - Colour becomes 0.299 R + 0.587 G + 0.114 B; alpha is ignored.
    - EXIF and TIFF orientation are not applied: rows and columns stay the sensor's own.
    - An image of colour or 16 bit may have fewer pixels: 2 * max_pixels bytes when decoded.

    Before anything is decoded, `formats.shape` tells its number of pixels and whether it is whole. Damage inside JPEG's or
    LZW's coded data is beyond that: it is decoded as far as it makes sense, and libjpeg says so on stderr.

    Raises:
      InputError: the file is missing, empty, not one of the formats, cut short, damaged, of more than `max_pixels`,
        of more than one page, of values other than unsigned 8 or 16 bit, or a TIFF that OpenCV would read wrongly.
    """
    return _grey(_load(Path(path), max_pixels))


def image_shape(path: str | Path, *, max_pixels: int = 2**28) -> tuple[int, int]:
    """(h, w) of an image, which is checked as `read_image` does, but not decoded.

    Raises:
      InputError: as `read_image`, but for what decoding would show.
    """
    try:
        return formats.shape(_read_bytes(Path(path), max_pixels), max_pixels)
    except Refused as refused:
        raise InputError(f"{path} {refused}") from refused


def read_mask(path: str | Path, shape: tuple[int, ...]) -> np.ndarray:
    """Reads a ground-truth mask as bool [h, w]; any value above 0 in any colour is a defect, alpha is ignored.

    Raises:
      InputError: as `read_image`, or the mask's size is not `shape`, its image's (h, w).
    """
    raw = _load(Path(path), 2**28)
    if raw.shape[:2] != tuple(shape):
        raise InputError(
            f"{path} is {_size(raw.shape)} pixels but its image is {_size(shape)}: give a mask of the image's size"
        )
    # The stored values, not the grey ones: a label of 1 must not round down to good.
    return raw.reshape(*raw.shape[:2], -1)[..., :3].max(axis=-1) > 0


def list_images(folder: str | Path, recursive: bool = False, *, root: str | Path | None = None) -> list[Path]:
    """The folder's images by suffix (`IMAGE_SUFFIXES`, any case), in plain (not natural) order, without hidden names.

    Raises:
      InputError: the folder is missing, is not a folder, cannot be read or has no images; or a link in it leads out of
        `root` (the folder itself by default) or, when recursive, to a folder.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        what = "is not a folder" if os.path.exists(folder) else "does not exist"
        raise InputError(f"{folder} {what}: name a folder of images")
    inside = os.path.realpath(folder if root is None else root)
    stay_inside(folder, inside)

    def unreadable(error: OSError) -> None:
        raise InputError(f"{error.filename} cannot be read ({error.strerror}): check its permissions") from error

    found = []
    for parent, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = [name for name in folders if recursive and not name.startswith(".")]
        for name in folders:
            if Path(parent, name).is_symlink():
                raise InputError(f"{Path(parent, name)} is a link to a folder: put the images themselves there")
        for name in names:
            path = Path(parent, name)
            if not name.startswith(".") and path.suffix.lower() in IMAGE_SUFFIXES:
                if path.is_symlink():
                    stay_inside(path, inside)
                found.append(path)
    if not found:
        suffixes = ", ".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
        raise InputError(f"{folder} has no images ({suffixes}): name the folder that holds them or one with train/good")
    return sorted(found)


def image_names(folder: str | Path) -> list[str]:
    """Names of a folder's images, as `list_images` tells them from other files, in no order; there may be none.

    Raises:
      InputError: the folder is missing, is not a folder or cannot be read.
    """
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error.strerror}): name a folder of images") from error
    return [name for name in names if not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)]


def good_images(data: str | Path) -> list[Path]:
    """The defect-free images to train on: those of `data/train/good` (MVTec AD's layout), else those of `data` itself.

    Raises:
      InputError: as `list_images`.
    """
    data = Path(data)
    folder = data / "train" / "good"
    return list_images(folder if folder.is_dir() else data, root=data)


def samples(data: str | Path) -> list[Sample]:
    """The test images of MVTec AD's layout, sorted by kind and name; [] where `data` has no folder `test`.

    Images are `test/<kind>/*`, masks `ground_truth/<kind>/<stem>_mask.png` or `<stem>.png`; good images need none.

    Raises:
      InputError: a defective image has no mask, a mask has no image or two, `test` has no folders, or as `list_images`.
    """
    data = Path(data)
    if data.is_dir() and not (data / "test").exists():
        return []
    kinds = _folders(data / "test")
    if not kinds:
        raise InputError(f"{data / 'test'} has no folders in it: sort the images into test/good and test/<defect>")
    masks = {}
    for folder in _folders(data / "ground_truth") if (data / "ground_truth").exists() else []:
        if folder.name != "good":
            for path in list_images(folder, root=data):
                if path.suffix.lower() == ".png":
                    masks[folder.name, path.stem] = path

    result = []
    owners: dict[Path, Path] = {}
    for folder in kinds:
        kind = folder.name
        for image in list_images(folder, root=data):
            if kind == "good":
                result.append(Sample(image, kind, None))
                continue
            mask = masks.get((kind, f"{image.stem}_mask"), masks.get((kind, image.stem)))
            if mask is None:
                wanted = data / "ground_truth" / kind / f"{image.stem}_mask.png"
                raise InputError(f"{image} has no mask: draw {wanted} or leave the image out")
            if mask in owners:
                raise InputError(f"{mask} is the mask of both {owners[mask]} and {image}: rename one of them")
            owners[mask] = image
            result.append(Sample(image, kind, mask))
    for (kind, _), mask in masks.items():
        if mask not in owners:
            raise InputError(f"{mask} is a mask without an image in {data / 'test' / kind}: add it or remove the mask")
    return result


def read_images(
    paths: Iterable[str | Path],
    *,
    min_size: int = 0,
    workers: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[np.ndarray]:
    """Reads images as `read_image` does, in threads; a list of uint8 [h, w] in the order of `paths`, sizes may differ.

    `progress`, if any, is called in the caller's thread with the number read so far, once per image.

    Raises:
      InputError: as `read_image`, or an image is smaller than `min_size` in height or width; the first such in order.
    """

    def read(path: str | Path) -> np.ndarray:
        image = read_image(path)
        if min(image.shape) < min_size:
            raise InputError(
                f"{path} is {_size(image.shape)} pixels, smaller than the patch of {min_size}: "
                "leave it out or use a smaller --config.patch_size"
            )
        return image

    images = []
    with ThreadPoolExecutor(workers) as pool:
        for image in pool.map(read, paths):  # on an error, map cancels what has not begun
            images.append(image)
            if progress is not None:
                progress(len(images))
    return images


def write_image(path: str | Path, image: np.ndarray) -> None:
    """Writes uint8 [h, w] (grey) or [h, w, 3] (RGB) in the format of the path's suffix, whole or not at all, making missing folders.

    Raises:
      InputError: the suffix is not one of `IMAGE_SUFFIXES`, or, with status 1, the file cannot be written.
      ValueError: the image has another dtype or shape.
    """
    path, image = Path(path), np.asarray(image)
    if (
        image.dtype != np.uint8
        or image.ndim not in (2, 3)
        or (image.ndim == 3 and image.shape[2] != 3)
        or not image.size
    ):
        raise ValueError(f"image must be uint8 [h, w] or [h, w, 3], got {image.dtype} {list(image.shape)}")
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise InputError(f"{path} has no image suffix: end its name in .png")
    try:
        done, coded = cv2.imencode(path.suffix, image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    except cv2.error:
        done = False
    if not done:
        raise InputError(f"{path} cannot hold an image of {_size(image.shape)} pixels: use .png or a smaller image")
    files.write_bytes(path, coded.tobytes())


def png(image: np.ndarray) -> bytes:
    """An image uint8 [h, w] as the bytes of a PNG file."""
    return cv2.imencode(".png", image)[1].tobytes()


def fingerprint(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, in hex.

    Raises:
      InputError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check its name and permissions") from error


def manifest(paths: Sequence[str | Path], root: str | Path) -> list[dict[str, str | int]]:
    """A row for each file, in order: its `path` below root (with slashes), its size in `bytes` and its `sha256`.

    Raises:
      InputError: a file cannot be read.
      ValueError: a path is not below `root`.
    """
    return [
        {
            "path": Path(path).relative_to(root).as_posix(),
            "sha256": fingerprint(path),
            "bytes": os.path.getsize(path),
        }
        for path in paths
    ]


def _size(shape: Sequence[int]) -> str:
    """Width x height, as image viewers show it."""
    return f"{shape[1]}x{shape[0]}"


def _folders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted; hidden ones are left out."""
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error.strerror}): name a folder with test/<kind> in it") from error


def stay_inside(path: Path, root: str) -> None:
    """Refuses a link that leads out of the data: what is read there would not be what was recorded or copied."""
    if not Path(os.path.realpath(path)).is_relative_to(root):
        raise InputError(f"{path} is a link that leads out of {root}: copy the images there instead")


def _grey(raw: np.ndarray) -> np.ndarray:
    """uint8 or uint16 [h, w] or [h, w, 3 or 4] (BGR, BGRA) to uint8 [h, w]."""
    if raw.ndim == 3:
        raw = cv2.cvtColor(raw, cv2.COLOR_BGR2GRAY if raw.shape[2] == 3 else cv2.COLOR_BGRA2GRAY)
    return raw if raw.dtype == np.uint8 else cv2.convertScaleAbs(raw, alpha=1 / 257)


def _load(path: Path, max_pixels: int) -> np.ndarray:
    """The values as stored: uint8 or uint16, [h, w] or [h, w, 3 or 4] (BGR, BGRA)."""
    try:
        return _decode(_read_bytes(path, max_pixels), max_pixels)
    except Refused as refused:
        raise InputError(f"{path} {refused}") from refused


def _read_bytes(path: Path, max_pixels: int) -> np.ndarray:
    """The file as writable uint8 [bytes]."""
    try:
        if not path.exists():
            raise Refused("does not exist: check its name")
        if not path.is_file():  # a pipe would block for ever
            raise Refused("is not a file: name an image")
        size = path.stat().st_size
        if size == 0:
            raise Refused("is empty: copy it again or leave it out")
        if size > 2 * max_pixels + 2**24:  # room for what is not pixels
            raise Refused(f"is a file of {size} bytes, too large for {max_pixels} pixels: cut it into smaller images")
        return np.fromfile(path, np.uint8)
    except OSError as error:
        raise Refused(f"cannot be read ({error.strerror}): check its permissions") from error


def _decode(data: np.ndarray, max_pixels: int) -> np.ndarray:
    size = formats.shape(data, max_pixels)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # the user is to see one sentence, not two
    try:
        raw = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise Refused(_UNDECODABLE) from error
    if raw is None:
        raise Refused(_UNDECODABLE)
    if raw.dtype not in (np.uint8, np.uint16):
        raise Refused(f"holds {raw.dtype} values: save it with unsigned 8 or 16 bit")
    if raw.shape[:2] != size or (raw.ndim == 3 and raw.shape[2] not in (3, 4)):
        raise Refused(_UNDECODABLE)
    return raw
