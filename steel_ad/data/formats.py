"""Image files as bytes: whether a PNG, JPEG, BMP or TIFF is whole, and how many pixels it has, before anything is decoded.

PNG's chunks are walked with their checksums up to IEND, JPEG's segments up to EOI, BMP's pixels, TIFF's strips or tiles and
deflate's checksums. Damage inside JPEG's or LZW's coded data is beyond that.
"""

import re
import struct
import zlib
from collections.abc import Callable

import numpy as np

_DAMAGED = "is cut short or damaged: copy it again or leave it out"
_TIFF_TYPES = {1: "B", 3: "H", 4: "I", 16: "Q"}
_TIFF_TAGS = {256, 257, 258, 259, 262, 273, 274, 277, 279, 284, 322, 323, 324, 325, 339}


class Refused(Exception):
    """Why a file is not read: a phrase that follows its name."""


def shape(data: np.ndarray, max_pixels: int) -> tuple[int, int]:
    """(h, w) of an image file's bytes, uint8, after a walk through them.

    Raises:
      Refused: the file is not one of the formats, cut short, damaged, of more than `max_pixels` or twice as many bytes when
        decoded, of more than one page, or a TIFF that OpenCV would read wrongly.
    """
    for signature, check in _FORMATS:
        if data[: len(signature)].tobytes() == signature:
            try:
                return check(memoryview(data), max_pixels)
            except (struct.error, OverflowError) as error:  # an offset or a length that points outside the file
                raise Refused(_DAMAGED) from error
    raise Refused("is not a PNG, BMP, TIFF or JPEG image: convert it or leave it out")


def _check_size(height: int, width: int, max_pixels: int, pixel_bytes: float = 1) -> tuple[int, int]:
    """Refuses what would be too large when decoded: `max_pixels`, and twice as many bytes."""
    if height < 1 or width < 1:
        raise Refused(_DAMAGED)
    if height * width > max_pixels:
        raise Refused(f"is {width}x{height} pixels, more than {max_pixels} in all: cut it into smaller images")
    if height * width * pixel_bytes > 2 * max_pixels:
        raise Refused(
            f"is {width}x{height} pixels of {pixel_bytes:g} bytes, more than {2 * max_pixels} bytes in all: save it in grey and 8 "
            "bit or cut it into smaller images"
        )
    return height, width


def _check_png(data: memoryview, max_pixels: int) -> tuple[int, int]:
    """(h, w) of a PNG whose chunks are all there and agree with their checksums."""
    if data[12:16] != b"IHDR":
        raise Refused(_DAMAGED)
    width, height, depth, colour = struct.unpack_from(">IIBB", data, 16)
    channels = {0: 1, 2: 3, 3: 4, 4: 4, 6: 4}.get(colour, 4)  # as decoded
    size = _check_size(height, width, max_pixels, channels * (2 if depth == 16 else 1))
    kind, start = b"", 8
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, start)
        end = start + 8 + length
        if struct.unpack_from(">I", data, end)[0] != zlib.crc32(data[start + 4 : end]):
            raise Refused(_DAMAGED)
        if kind == b"acTL":
            raise Refused("is an animation: save each picture as a file of its own")
        start = end + 4
    return size


def _check_jpeg(data: memoryview, max_pixels: int) -> tuple[int, int]:
    """(h, w) of a JPEG whose coded data run up to an end-of-image marker."""
    size, start, kind = None, 2, 0
    # Walking by segments up to the first scan keeps a thumbnail's end marker from passing for the image's.
    while kind != 0xDA:
        mark, kind = struct.unpack_from("BB", data, start)
        if mark != 0xFF:
            raise Refused(_DAMAGED)
        if kind == 0xFF:  # fill
            start += 1
            continue
        (length,) = struct.unpack_from(">H", data, start + 2)
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            height, width, channels = struct.unpack_from(">HHB", data, start + 5)
            size = _check_size(height, width, max_pixels, 3 if channels > 1 else 1)
        start += 2 + length
    if size is None or not re.search(b"\xff\xd9", data[start:]):
        raise Refused(_DAMAGED)
    return size


def _check_bmp(data: memoryview, max_pixels: int) -> tuple[int, int]:
    """(h, w) of a BMP that is long enough for its pixels."""
    offset, header = struct.unpack_from("<II", data, 10)
    width, height, _, bits = struct.unpack_from("<HHHH" if header == 12 else "<iiHH", data, 18)
    compression, stated = (0, 0) if header == 12 else struct.unpack_from("<II", data, 30)
    # A negative height means from top to bottom.
    size = _check_size(abs(height), width, max_pixels, max(1, bits // 8))
    # Run-length coded pixels (compression 1 and 2) must state their bytes.
    length = stated if compression in (1, 2) else (width * bits + 31) // 32 * 4 * abs(height)
    if offset + length > len(data):
        raise Refused(_DAMAGED)
    return size


def _check_tiff(data: memoryview, max_pixels: int) -> tuple[int, int]:
    """(h, w) of a TIFF or BigTIFF of one page, of values that OpenCV reads rightly, with all its strips or tiles."""
    order = "<" if data[:2] == b"II" else ">"
    big = struct.unpack_from(order + "H", data, 2)[0] == 43
    word, count_word, inline = ("Q", "Q", 8) if big else ("I", "H", 4)
    (start,) = struct.unpack_from(order + word, data, 8 if big else 4)
    (count,) = struct.unpack_from(order + count_word, data, start)
    start += struct.calcsize(order + count_word)
    step = 4 + 2 * inline
    if start + count * step > len(data):
        raise Refused(_DAMAGED)
    tags = {}
    for entry in range(start, start + count * step, step):
        tag, kind, items = struct.unpack_from(f"{order}HH{word}", data, entry)
        if tag not in _TIFF_TAGS:
            continue
        if tag in tags or kind not in _TIFF_TYPES or items == 0:  # readers differ in what they make of these
            raise Refused(_DAMAGED)
        form = f"{order}{items}{_TIFF_TYPES[kind]}"
        at = entry + 4 + inline
        if struct.calcsize(form) > inline:
            (at,) = struct.unpack_from(order + word, data, at)
        tags[tag] = struct.unpack_from(form, data, at)
        if tag == 274:
            struct.pack_into(form, data, at, *(1 for _ in range(items)))  # OpenCV would turn the image by this tag
    if struct.unpack_from(order + word, data, start + count * step)[0]:
        raise Refused("holds more than one page: save each page as a file of its own")

    def first(tag: int, default: int) -> int:
        return tags.get(tag, (default,))[0]

    bits, channels, compression = first(258, 1), first(277, 1), first(259, 1)
    pixel_bytes = (3 if channels == 3 else 4 if channels > 3 else 1) * max(1, bits // 8)
    size = _check_size(first(257, 0), first(256, 0), max_pixels, pixel_bytes)
    tile = _check_size(first(323, 1), first(322, 1), max_pixels, pixel_bytes)  # a tile may be larger than its image
    if set(tags.get(339, (1,))) != {1} or bits not in (1, 4, 8, 16):
        raise Refused(f"holds signed, floating-point or {bits}-bit values: save it with unsigned 8 or 16 bit")
    if bits == 16 and (first(262, 1) == 0 or (first(284, 1) == 2 and channels > 1)):
        # OpenCV neither inverts the former nor joins the latter's planes, without a word.
        raise Refused("has 16 bit with 0 as white or with separate colour planes: save it as a plain 16-bit PNG")
    if compression not in (1, 5, 8, 32946) or channels > 4 or first(262, 1) == 6:
        raise Refused("is a TIFF of an unusual kind: save it with LZW, deflate or no compression, in grey or RGB")
    offsets, lengths = tags.get(324, tags.get(273, ())), tags.get(325, tags.get(279, ()))
    if not offsets or len(offsets) != len(lengths):
        raise Refused(_DAMAGED)
    wanted = size[0] * size[1] * bits * channels // 8
    most = max(wanted, tile[0] * tile[1] * bits * channels // 8) + 64
    found = 0
    for offset, length in zip(offsets, lengths, strict=True):
        part = data[offset : offset + length]
        if len(part) < length:
            raise Refused(_DAMAGED)
        # OpenCV fills what it cannot decompress with zeros.
        if compression == 1:
            found += length
        elif compression == 5:
            found = wanted
            if not any(part[-3:]):  # LZW's end code is in there, and is not 0
                raise Refused(_DAMAGED)
        else:
            found += _inflated(part, most)
    if found < wanted:
        raise Refused(_DAMAGED)
    return size


def _inflated(part: memoryview, most: int) -> int:
    """The length of a whole zlib stream's content, of `most` bytes at most."""
    stream = zlib.decompressobj()
    try:
        length = len(stream.decompress(part, most))
    except zlib.error as error:
        raise Refused(_DAMAGED) from error
    if not stream.eof:
        raise Refused(_DAMAGED)
    return length


_FORMATS: tuple[tuple[bytes, Callable[[memoryview, int], tuple[int, int]]], ...] = (
    (b"\x89PNG\r\n\x1a\n", _check_png),
    (b"\xff\xd8", _check_jpeg),
    (b"BM", _check_bmp),
    (b"II*\0", _check_tiff),
    (b"MM\0*", _check_tiff),
    (b"II+\0", _check_tiff),
    (b"MM\0+", _check_tiff),
)
