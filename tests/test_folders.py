"""Images in from folders: right values from every format, one sentence for everything that is not an image."""

import hashlib
import io
import os
import random
import resource
import struct
import threading
import zlib

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from steel_ad.data import folders
from steel_ad.data.folders import Sample
from steel_ad.errors import InputError


def plate(height=37, width=23, channels=0, bits=8, seed=0):
    """Smooth enough for JPEG, different in every channel; unsigned [h, w] or [h, w, channels] (RGB)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(rng.uniform(0.1, 0.3) * y + rng.uniform(0.1, 0.3) * x + k) for k in range(max(channels, 1))]
    image = np.round((0.5 + 0.5 * np.stack(waves, -1)) * (2**bits - 1)).astype(np.uint8 if bits == 8 else np.uint16)
    return image if channels else image[..., 0]


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(image, *, before=b"", size=None):
    """A PNG written by its specification; `size` lies about (h, w), `before` goes ahead of the pixels."""
    channels = 1 if image.ndim == 2 else image.shape[2]
    height, width = size or image.shape[:2]
    head = struct.pack(">IIBBBBB", width, height, 8 * image.itemsize, {1: 0, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = image.astype(image.dtype.newbyteorder(">"))
    pixels = b"".join(b"\0" + row.tobytes() for row in rows)
    body = chunk(b"IHDR", head) + before + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def tiff(image, **options):
    buffer = io.BytesIO()
    options.setdefault("photometric", "rgb" if image.ndim == 3 else "minisblack")
    tifffile.imwrite(buffer, image, **options)
    return buffer.getvalue()


def pillow(image, kind, **options):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()


def bmp(image):
    return pillow(image, "BMP")


def jpeg(image, **options):
    return pillow(image, "JPEG", quality=98, **options)


def run_length_bmp(coded=bytes([8, 5, 0, 0, 8, 6, 0, 1])):
    """8x2 pixels, RLE8: a row of 5s and a row of 6s in a palette of greys."""
    palette = b"".join(bytes([v, v, v, 0]) for v in range(256))
    info = struct.pack("<IiiHHIIiiII", 40, 8, 2, 1, 8, 1, len(coded), 0, 0, 256, 0)
    offset = 14 + len(info) + len(palette)
    return b"BM" + struct.pack("<IHHI", offset + len(coded), 0, 0, offset) + info + palette + coded


def grey(image):
    """The documented conversion in float64: Rec. 601 weights, full range of 16 bit onto 8."""
    if image.ndim == 3:
        image = image[..., :3] @ np.array([0.299, 0.587, 0.114])
    return image / (257 if image.max() > 255 else 1)


def refusal(path, call=folders.read_image, *arguments, **options):
    """The one sentence that a bad file ends in; it names the file."""
    with pytest.raises(InputError) as caught:
        call(path, *arguments, **options)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert ". " not in message
    assert ": " in message  # what, then how to mend it
    return message


COLOURS = pytest.mark.parametrize("channels", [0, 3], ids=["grey", "colour"])
BITS = pytest.mark.parametrize("bits", [8, 16])


@COLOURS
@BITS
@pytest.mark.parametrize("writer", [png, tiff])
def test_lossless_of_8_and_16_bit(tmp_path, writer, bits, channels):
    image = plate(channels=channels, bits=bits)
    (tmp_path / "x").write_bytes(writer(image))
    got = folders.read_image(tmp_path / "x")
    assert got.dtype == np.uint8
    assert got.shape == (37, 23)
    np.testing.assert_allclose(got, grey(image), atol=0.5 if not channels else 1.01)


@COLOURS
@pytest.mark.parametrize(("writer", "tolerance"), [(bmp, 1.01), (jpeg, 5)])
def test_8_bit_only_formats(tmp_path, writer, tolerance, channels):
    image = plate(channels=channels)
    (tmp_path / "x").write_bytes(writer(image))
    np.testing.assert_allclose(folders.read_image(tmp_path / "x"), grey(image), atol=tolerance)


def test_every_16_bit_value_is_rounded_by_257(tmp_path):
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    (tmp_path / "x.png").write_bytes(png(values))
    np.testing.assert_array_equal(folders.read_image(tmp_path / "x.png"), np.round(values / 257))


@pytest.mark.parametrize(
    "options",
    [
        {"byteorder": ">"},
        {"bigtiff": True},
        {"bigtiff": True, "byteorder": ">"},
        {"tile": (16, 16)},
        {"compression": "zlib", "rowsperstrip": 5},
        {"rowsperstrip": 1},
    ],
    ids=str,
)
def test_tiff_variants(tmp_path, options):
    image = plate(bits=16)
    (tmp_path / "x.tif").write_bytes(tiff(image, **options))
    np.testing.assert_allclose(folders.read_image(tmp_path / "x.tif"), grey(image), atol=0.5)


def test_tiff_with_0_as_white_is_inverted_or_refused(tmp_path):
    (tmp_path / "x.tif").write_bytes(tiff(plate(), photometric="miniswhite"))
    np.testing.assert_array_equal(folders.read_image(tmp_path / "x.tif"), 255 - plate())
    (tmp_path / "y.tif").write_bytes(tiff(plate(bits=16), photometric="miniswhite"))
    assert "0 as white" in refusal(tmp_path / "y.tif")


def test_separate_planes_are_read_or_refused(tmp_path):
    image = plate(channels=3)
    planes = np.ascontiguousarray(np.moveaxis(image, -1, 0))
    (tmp_path / "x.tif").write_bytes(tiff(planes, planarconfig="separate"))
    np.testing.assert_allclose(folders.read_image(tmp_path / "x.tif"), grey(image), atol=1.01)
    (tmp_path / "y.tif").write_bytes(tiff(planes.astype(np.uint16) * 257, planarconfig="separate"))
    assert "planes" in refusal(tmp_path / "y.tif")


def test_jpeg_fill_bytes(tmp_path):
    whole = jpeg(plate())
    (tmp_path / "x.jpg").write_bytes(whole.replace(b"\xff\xc0", b"\xff\xff\xff\xc0"))
    np.testing.assert_allclose(folders.read_image(tmp_path / "x.jpg"), plate(), atol=5)


def test_progressive_jpeg_and_run_length_bmp(tmp_path):
    image = plate(channels=3)
    (tmp_path / "x.jpg").write_bytes(jpeg(image, progressive=True))
    np.testing.assert_allclose(folders.read_image(tmp_path / "x.jpg"), grey(image), atol=5)
    (tmp_path / "x.bmp").write_bytes(run_length_bmp())
    np.testing.assert_array_equal(folders.read_image(tmp_path / "x.bmp"), [[6] * 8, [5] * 8])  # the last row is first


@BITS
def test_alpha_is_ignored(tmp_path, bits):
    image = plate(channels=4, bits=bits)
    image[..., 3] = 0
    (tmp_path / "x.png").write_bytes(png(image))
    np.testing.assert_allclose(folders.read_image(tmp_path / "x.png"), grey(image), atol=1.01)


@pytest.mark.parametrize("orientation", [2, 3, 6, 8])
def test_orientation_is_not_applied(tmp_path, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    image = plate()
    (tmp_path / "x.jpg").write_bytes(jpeg(image, exif=exif))
    (tmp_path / "x.png").write_bytes(pillow(image, "PNG", exif=exif))
    (tmp_path / "x.tif").write_bytes(tiff(image, extratags=[(274, 3, 1, orientation, True)]))
    for name in ("x.jpg", "x.png", "x.tif"):
        np.testing.assert_allclose(folders.read_image(tmp_path / name), image, atol=5, err_msg=name)


@pytest.mark.parametrize("writer", [png, bmp, tiff, jpeg])
@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (50, 1)])
def test_tiny_images(tmp_path, writer, shape):
    image = np.full(shape, 77, np.uint8)
    (tmp_path / "x").write_bytes(writer(image))
    np.testing.assert_allclose(folders.read_image(tmp_path / "x"), image, atol=1)


def test_what_is_no_file(tmp_path):
    assert "does not exist" in refusal(tmp_path / "gone.png")
    (tmp_path / "x.png").mkdir()
    assert "is not a file" in refusal(tmp_path / "x.png")
    os.mkfifo(tmp_path / "pipe.png")
    assert "is not a file" in refusal(tmp_path / "pipe.png")
    (tmp_path / "zero.png").touch()
    assert "is empty" in refusal(tmp_path / "zero.png")


def test_what_is_no_image(tmp_path):
    other = tmp_path / "x.png"
    for content in (b"\0", b"hello", random.Random(0).randbytes(5000), pillow(plate(), "GIF"), pillow(plate(), "WEBP")):
        other.write_bytes(content)
        assert "is not a PNG, BMP, TIFF or JPEG" in refusal(other)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8", "int16", "uint32", "uint64"])
def test_other_dtypes(tmp_path, dtype):
    (tmp_path / "x.tif").write_bytes(tiff(plate().astype(dtype)))
    assert "unsigned 8 or 16 bit" in refusal(tmp_path / "x.tif")


def test_several_pictures_in_a_file(tmp_path):
    (tmp_path / "x.tif").write_bytes(tiff(np.stack([plate()] * 5), photometric="minisblack"))
    assert "more than one page" in refusal(tmp_path / "x.tif")
    buffer = io.BytesIO()
    frames = [Image.fromarray(plate(seed=k)) for k in range(2)]
    frames[0].save(buffer, "PNG", save_all=True, append_images=frames[1:])
    (tmp_path / "x.png").write_bytes(buffer.getvalue())
    assert "animation" in refusal(tmp_path / "x.png")


def wide(content, offset, form, *sizes):
    """The content with other sizes written into its header."""
    return content[:offset] + struct.pack(form, *sizes) + content[offset + struct.calcsize(form) :]


def wide_tiff(tag, **options):
    content = tiff(plate(), **options)
    entry = content.index(struct.pack("<HH", tag, 4 if struct.pack("<HHI", tag, 4, 1) in content else 3))
    return wide(content, entry, "<HHII", tag, 4, 1, 600_000_000)


BOMBS = {
    "png": lambda: png(plate(), size=(60000, 60000)),
    "bmp": lambda: wide(bmp(plate()), 18, "<ii", 60000, 60000),
    "bmp upside down": lambda: wide(bmp(plate()), 18, "<ii", 60000, -60000),
    "jpeg": lambda: wide(jpeg(plate()), jpeg(plate()).index(b"\xff\xc0") + 5, ">HH", 60000, 60000),
    "tiff width": lambda: wide_tiff(256),
    "tiff tile": lambda: wide_tiff(322, tile=(16, 16)),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_not_decoded(tmp_path, monkeypatch, bomb):
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    (tmp_path / "x").write_bytes(BOMBS[bomb]())
    message = refusal(tmp_path / "x")
    assert "pixels, more than" in message
    assert "60000" in message


def test_max_pixels_is_a_closed_limit(tmp_path):
    (tmp_path / "x.png").write_bytes(png(plate()))
    assert folders.read_image(tmp_path / "x.png", max_pixels=37 * 23).shape == (37, 23)
    assert "23x37 pixels" in refusal(tmp_path / "x.png", max_pixels=37 * 23 - 1)


def test_a_huge_file_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(np, "fromfile", lambda *_: pytest.fail("read"))
    with open(tmp_path / "x.bmp", "wb") as file:
        file.write(bmp(plate()))
        file.truncate(2**33)  # sparse
    assert "too large" in refusal(tmp_path / "x.bmp")


WHOLE = {
    "png": png(plate()),
    "png colour": png(plate(channels=3)),
    "bmp": bmp(plate()),
    "bmp colour": bmp(plate(channels=3)),
    "bmp run length": run_length_bmp(),
    "jpeg": jpeg(plate()),
    "jpeg progressive": jpeg(plate(channels=3), progressive=True),
    "tiff": tiff(plate()),
    "tiff zlib": tiff(plate(channels=3), compression="zlib"),
    "tiff lzw": pillow(plate(channels=3), "TIFF", compression="tiff_lzw"),
    "tiff tiles": tiff(plate(bits=16), tile=(16, 16)),
    "bigtiff": tiff(plate(), bigtiff=True, byteorder=">"),
    "tiff directory last": cv2.imencode(".tif", plate())[1].tobytes(),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_no_truncation_is_accepted(tmp_path, monkeypatch, kind):
    path, whole = tmp_path / "x", WHOLE[kind]
    path.write_bytes(whole)
    folders.read_image(path)
    # Some versions of OpenCV fill what is missing with grey.
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    cuts = {*range(1, 60), *range(60, len(whole), 1 + len(whole) // 60), *range(len(whole) - 20, len(whole))}
    for cut in cuts:
        path.write_bytes(whole[:cut])
        refusal(path)


@pytest.mark.parametrize(
    "decoded",
    [None, np.zeros((23, 37), np.uint8), np.zeros((37, 23, 2), np.uint8)],
    ids=["none", "turned", "two channels"],
)
def test_what_is_decoded_must_be_what_the_header_says(tmp_path, monkeypatch, decoded):
    (tmp_path / "x.png").write_bytes(WHOLE["png"])
    monkeypatch.setattr(cv2, "imdecode", lambda *_: decoded)
    assert "cannot be decoded" in refusal(tmp_path / "x.png")


@pytest.mark.parametrize("kind", ["png", "jpeg", "jpeg progressive", "tiff zlib", "tiff lzw", "tiff directory last"])
@pytest.mark.parametrize("share", [0.4, 0.7, 0.99])
def test_a_copy_that_stopped_leaves_zeros(tmp_path, kind, share):
    whole = WHOLE[kind]
    end = int(len(whole) * share)
    if kind == "tiff lzw":  # its directory is last and would give the copy away: leave it whole
        page = tifffile.TiffFile(io.BytesIO(whole)).pages[0]
        end, stop = (
            page.dataoffsets[0] + int(page.databytecounts[0] * share),
            sum(page.dataoffsets + page.databytecounts),
        )
        content = whole[:end] + bytes(stop - end) + whole[stop:]
    else:
        content = whole[:end] + bytes(len(whole) - end)
    assert len(content) == len(whole)
    (tmp_path / "x").write_bytes(content)
    refusal(tmp_path / "x")


def test_deflated_tiff_with_too_few_rows(tmp_path):
    whole = tiff(plate(), compression="zlib", rowsperstrip=37)
    page = tifffile.TiffFile(io.BytesIO(whole)).pages[0]
    start, stop = page.dataoffsets[0], page.dataoffsets[0] + page.databytecounts[0]
    short = zlib.compress(plate()[:20].tobytes())
    (tmp_path / "x.tif").write_bytes(whole[:start] + short + bytes(stop - start - len(short)) + whole[stop:])
    assert "damaged" in refusal(tmp_path / "x.tif")


@pytest.mark.parametrize("compression", ["packbits", "jpeg"])
def test_tiff_compressions_that_hide_damage(tmp_path, compression):
    (tmp_path / "x.tif").write_bytes(pillow(plate(), "TIFF", compression=compression))
    assert "unusual" in refusal(tmp_path / "x.tif")


def test_thumbnail_does_not_stand_for_the_end_of_a_jpeg(tmp_path):
    whole = jpeg(plate(), exif=b"Exif\0\0" + jpeg(plate(8, 8)))
    (tmp_path / "x.jpg").write_bytes(whole[:-40])
    assert "cut short" in refusal(tmp_path / "x.jpg")


def test_any_flipped_bit_of_a_png_is_refused(tmp_path):
    whole = WHOLE["png"]
    for position in range(8, len(whole), 3):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        (tmp_path / "x.png").write_bytes(damaged)
        refusal(tmp_path / "x.png")


@pytest.mark.parametrize("kind", WHOLE)
def test_mutations_end_in_an_image_or_a_sentence(tmp_path, kind):
    path, rng = tmp_path / "x", random.Random(1)
    for _ in range(100):
        damaged = bytearray(WHOLE[kind])
        for _ in range(rng.choice([1, 1, 2, 8])):
            # Half of them in the header, with the values that overflow what reads it.
            position = rng.randrange(rng.choice([min(60, len(damaged)), len(damaged)]))
            damaged[position] = rng.choice([0, 1, 127, 255, rng.randrange(256)])
        path.write_bytes(damaged)
        try:
            image = folders.read_image(path, max_pixels=2**22)
        except InputError:
            refusal(path, max_pixels=2**22)
        else:
            assert image.dtype == np.uint8
            assert image.ndim == 2


def test_a_repeated_tiff_tag_does_not_hide_a_bomb(tmp_path):
    whole = tiff(plate())
    software = whole.index(struct.pack("<HH", 305, 2))
    (tmp_path / "x.tif").write_bytes(wide(whole, software, "<HHII", 256, 4, 1, 600_000_000))
    assert "damaged" in refusal(tmp_path / "x.tif")


def test_libraries_stay_silent(tmp_path, capfd):
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_WARNING)
    undecodable = run_length_bmp(bytes([8, 5]))
    for content in (undecodable, WHOLE["tiff zlib"][:-30], WHOLE["png"][:-30], WHOLE["jpeg"][:-300], WHOLE["bmp"][:-5]):
        (tmp_path / "x").write_bytes(content)
        refusal(tmp_path / "x")
    captured = capfd.readouterr()
    assert captured.err == captured.out == ""


def test_mask_is_any_value_above_0(tmp_path):
    wanted = np.zeros((6, 5), bool)
    wanted[1:3, 2:] = True
    for name, content in {
        "255.png": png(wanted.astype(np.uint8) * 255),
        "1.png": png(wanted.astype(np.uint8)),
        "1 of 16 bit.png": png(wanted.astype(np.uint16)),
        "1 in blue.png": png(np.dstack([np.zeros((6, 5, 2), np.uint8), wanted])),
        "1 bit.png": pillow(wanted, "PNG"),
        "opaque.png": png(np.dstack([wanted.astype(np.uint8)] * 3 + [np.full((6, 5), 255, np.uint8)])),
    }.items():
        (tmp_path / name).write_bytes(content)
        mask = folders.read_mask(tmp_path / name, (6, 5))
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, wanted, err_msg=name)


def test_mask_of_another_size(tmp_path):
    (tmp_path / "m.png").write_bytes(png(plate(5, 6)))
    message = refusal(tmp_path / "m.png", folders.read_mask, (6, 5))
    assert "6x5" in message
    assert "5x6" in message
    refusal(tmp_path / "gone.png", folders.read_mask, (6, 5))


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_list_images(tmp_path):
    names = ["10.png", "9.png", "B.PNG", "a.bmp", "b.tif", "c.tiff", "d.jpg", "e.JPEG"]
    touch(*(tmp_path / name for name in [*names, ".hidden.png", "notes.txt", "x.npy", ".jpg", "png", "deep/f.png"]))
    touch(tmp_path / ".cache" / "g.png")
    (tmp_path / "folder.png").mkdir()
    assert [p.name for p in folders.list_images(tmp_path)] == names
    deep = folders.list_images(str(tmp_path), recursive=True)
    assert [p.relative_to(tmp_path).as_posix() for p in deep] == sorted([*names, "deep/f.png"])


def test_list_images_refusals(tmp_path):
    assert "does not exist" in refusal(tmp_path / "gone", folders.list_images)
    touch(tmp_path / "x.png", tmp_path / "empty" / ".x.png", tmp_path / "above" / "below" / "x.png")
    assert "not a folder" in refusal(tmp_path / "x.png", folders.list_images)
    assert "png, bmp, tif, tiff, jpg, jpeg" in refusal(tmp_path / "empty", folders.list_images)
    assert "no images" in refusal(tmp_path / "above", folders.list_images)


def test_links(tmp_path):
    data, outside = tmp_path / "data", tmp_path / "data2" / "x.png"
    touch(data / "a" / "x.png", data / "b" / "y.png", outside)
    (data / "a" / "link.png").symlink_to(data / "b" / "y.png")
    refusal(data / "a" / "link.png", lambda _: folders.list_images(data / "a"))
    assert [p.name for p in folders.list_images(data / "a", root=data)] == ["link.png", "x.png"]
    (data / "b" / "out.png").symlink_to(outside)
    refusal(data / "b" / "out.png", lambda _: folders.list_images(data, recursive=True))
    (data / "b" / "out.png").unlink()
    (data / "c").symlink_to(outside.parent)
    refusal(data / "c", lambda _: folders.list_images(data, recursive=True))
    refusal(data / "c", folders.list_images, root=data)
    assert len(folders.list_images(data / "c")) == 1  # a folder named by the user may itself be a link
    (data / "a" / "loop.png").symlink_to(data / "a" / "loop.png")
    (data / "a" / "broken.png").symlink_to(data / "a" / "gone.png")
    assert len(folders.list_images(data / "a", root=data)) == 4  # not left out in silence: reading them says why
    refusal(data / "a" / "broken.png")
    refusal(data / "a" / "loop.png")


def test_good_images(tmp_path):
    touch(tmp_path / "plain.png")
    assert folders.good_images(tmp_path) == [tmp_path / "plain.png"]
    touch(tmp_path / "train" / "good" / "0.png", tmp_path / "train" / "other" / "0.png")
    assert folders.good_images(tmp_path) == [tmp_path / "train" / "good" / "0.png"]
    refusal(tmp_path / "train", folders.good_images)


def mvtec(root):
    touch(root / "test/good/000.png", root / "test/scratch/001.png", root / "test/scratch/000.tif")
    touch(root / "test/cut/000.png", root / "test/.hidden/000.png", root / "test/readme.txt")
    touch(root / "ground_truth/scratch/001_mask.png", root / "ground_truth/scratch/000.png")
    touch(root / "ground_truth/cut/000_mask.PNG", root / "ground_truth/good/.keep")
    return root


def test_samples(tmp_path):
    root = mvtec(tmp_path)
    truth = root / "ground_truth"
    assert folders.samples(str(root)) == [
        Sample(root / "test/cut/000.png", "cut", truth / "cut/000_mask.PNG"),
        Sample(root / "test/good/000.png", "good", None),
        Sample(root / "test/scratch/000.tif", "scratch", truth / "scratch/000.png"),
        Sample(root / "test/scratch/001.png", "scratch", truth / "scratch/001_mask.png"),
    ]


def test_samples_of_a_plain_folder(tmp_path):
    touch(tmp_path / "x.png")
    assert folders.samples(tmp_path) == []
    refusal(tmp_path / "gone", folders.samples)


def test_samples_refusals(tmp_path):
    def refused(path, name):
        return refusal(path, lambda _: folders.samples(tmp_path / name))

    image = mvtec(tmp_path / "a") / "test/scratch/002.png"
    touch(image)
    assert "002_mask.png" in refused(image, "a")
    mask = mvtec(tmp_path / "b") / "ground_truth/scratch/002_mask.png"
    touch(mask)
    assert "without an image" in refused(mask, "b")
    mask = mvtec(tmp_path / "c") / "ground_truth/dent/000_mask.png"
    touch(mask)
    assert "without an image" in refused(mask, "c")
    twin = mvtec(tmp_path / "d") / "test/scratch/001.bmp"
    touch(twin)
    assert "001.png" in refused(twin, "d")
    touch(tmp_path / "e" / "test" / "000.png")
    assert "test/good" in refused(tmp_path / "e" / "test", "e")
    (mvtec(tmp_path / "f") / "test/empty").mkdir()
    assert "no images" in refused(tmp_path / "f" / "test" / "empty", "f")


def test_read_images_keeps_the_order(tmp_path):
    sizes = [(10 + (7 * k) % 23, 12 + k) for k in range(24)]
    paths = [tmp_path / f"{k}.png" for k in range(24)]
    for k, path in enumerate(paths):
        path.write_bytes(png(plate(*sizes[k], seed=k)))
    seen = []
    images = folders.read_images(
        paths, workers=4, min_size=10, progress=lambda n: seen.append((n, threading.current_thread()))
    )
    assert seen == [(k + 1, threading.main_thread()) for k in range(24)]
    for k, image in enumerate(images):
        np.testing.assert_array_equal(image, plate(*sizes[k], seed=k))
    assert folders.read_images([]) == []


def test_read_images_names_the_first_small_one(tmp_path):
    for name, shape in {"a": (128, 128), "b": (90, 200), "c": (300, 127), "d": (1, 1)}.items():
        (tmp_path / f"{name}.png").write_bytes(png(plate(*shape)))
    paths = folders.list_images(tmp_path)
    message = refusal(paths[1], lambda _: folders.read_images(paths, min_size=128, workers=4))
    assert "is 200x90 pixels, smaller than the patch of 128" in message
    assert "--config.patch_size" in message
    refusal(paths[2], lambda _: folders.read_images(paths[2:], min_size=128))
    assert len(folders.read_images(paths[:3], min_size=90)) == 3


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".TIFF", ".jpg", ".jpeg"])
@COLOURS
def test_write_image(tmp_path, suffix, channels):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(b"old")
    image = plate(channels=channels)
    folders.write_image(path, image[:, ::-1])
    difference = np.abs(np.asarray(Image.open(path)).astype(int) - image[:, ::-1])  # channels in RGB order
    assert difference.mean() <= (5 if "j" in suffix else 0)
    assert os.listdir(tmp_path) == [path.name]


def test_write_image_on_a_full_disk_keeps_the_old_file(tmp_path):
    path = tmp_path / "x.bmp"
    folders.write_image(path, plate(5, 5))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(InputError) as caught:
            folders.write_image(path, plate(200, 200))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.status == 1
    assert str(path) in str(caught.value)
    np.testing.assert_array_equal(folders.read_image(path), plate(5, 5))
    assert os.listdir(tmp_path) == ["x.bmp"]


def test_write_image_refusals(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    refusal(tmp_path / "file" / "x.png", folders.write_image, plate())
    refusal(tmp_path / "x.webp", folders.write_image, plate())
    refusal(tmp_path / "x.jpg", folders.write_image, np.zeros((1, 70000), np.uint8))
    (tmp_path / "folder.png").mkdir()
    refusal(tmp_path / "folder.png", folders.write_image, plate())
    for image in (plate().astype(np.float32), plate(channels=4), plate()[0], plate()[:0], plate(bits=16)):
        with pytest.raises(ValueError, match="uint8"):
            folders.write_image(tmp_path / "x.png", image)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.png"]


def test_fingerprint_and_manifest(tmp_path):
    contents = {"b/2.png": b"two", "a/1.png": b"", "b/1.png": bytes(10**6)}
    for name, content in contents.items():
        touch(tmp_path / name)
        (tmp_path / name).write_bytes(content)
    assert folders.manifest([tmp_path / name for name in contents], tmp_path) == [
        {"path": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in contents.items()
    ]
    refusal(tmp_path / "gone.png", folders.fingerprint)
    refusal(tmp_path / "a", folders.fingerprint)


@pytest.mark.parametrize(("channels", "bits"), [(3, 8), (4, 8), (1, 16), (4, 16)])
def test_colour_and_depth_count_as_memory(tmp_path, monkeypatch, channels, bits):
    """2 ** 28 pixels of eight bytes would be two gigabytes."""
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    image = plate(channels=0 if channels == 1 else channels, bits=bits)
    if channels * bits == 16:
        (tmp_path / "x.png").write_bytes(png(image, size=(37, 25)))
        assert folders.image_shape(tmp_path / "x.png", max_pixels=37 * 25) == (37, 25)
    else:
        (tmp_path / "x.png").write_bytes(png(image, size=(16_000, 16_000)))
        assert f"pixels of {channels * bits // 8} bytes, more than" in refusal(tmp_path / "x.png")
    (tmp_path / "x.tif").write_bytes(tiff(image))
    most = -(-37 * 23 * channels * bits // 16)
    assert folders.image_shape(tmp_path / "x.tif", max_pixels=max(37 * 23, most)) == (37, 23)
    if most > 37 * 23:
        assert "bytes, more than" in refusal(tmp_path / "x.tif", max_pixels=most - 1)
