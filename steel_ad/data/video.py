"""Frames of line-scan videos as grey uint8 arrays, one after the other, and how much there is to see in them.

    for frame in video.frames("plate.avi"):  # uint8 [h, w]
        contrast, sharpness = video.measure(frame)

A damaged file gives the frames before the damage, and then one sentence.
"""

import contextlib
import os
from collections.abc import Generator, Iterator
from pathlib import Path

import cv2
import numpy as np

from steel_ad.errors import InputError

MAX_PIXELS = 2**26  # of a frame; decoding takes a multiple of its size

_SMOOTHING_PX = 1.5
# FFmpeg would also take pictures, playlists and plain text for videos.
_CONTAINERS = (
    (8, b"AVI "),
    *((4, kind) for kind in (b"ftyp", b"moov", b"mdat", b"wide", b"free")),  # MP4, MOV
    (0, b"\x1aE\xdf\xa3"),  # Matroska, WebM
    (0, b"0&\xb2u\x8ef\xcf\x11"),  # ASF, WMV
    (0, b"\0\0\1\xba"),  # MPEG
    (0, b"YUV4MPEG2"),
)


class CutShort(InputError):
    """Frames were read, but fewer than the file promises; raised after the last one."""

    def __init__(self, message: str):
        super().__init__(message, status=1)


def length(path: str | Path) -> int:
    """The number of frames that the file promises; 0 where it does not say.

    Raises:
      InputError: as `frames`, but for what concerns the frames.
    """
    with _opened(Path(path)) as capture:
        return _promised(capture)


def missing(path: str | Path, *, read: int, promised: int) -> str | None:
    """The sentence that names the frames of which only `read` could be read; None where all were."""
    if read >= promised:
        return None
    return (
        f"{path} promises {promised} frames, of which {promised - read} cannot be read, so it is cut short or damaged: "
        "copy it again"
    )


def frames(path: str | Path) -> Generator[np.ndarray, None, None]:
    """Decodes a video (AVI, MP4, MOV, Matroska, WebM, WMV, MPEG or Y4M, in any codec of OpenCV's FFmpeg).

    Yields uint8 [h, w] in 0..255 in the file's order, each an array of its own; colour becomes
    0.299 R + 0.587 G + 0.114 B. A last frame that is not whole is left out. Damage inside a frame's coded data is beyond
    that: FFmpeg decodes it as far as it makes sense, or leaves the frame out. FFmpeg's own messages are silenced.

    Raises:
      InputError: with the first frame: the file is missing, no video, of more than `MAX_PIXELS`, without frames or, with
        status 1, a video of which nothing can be decoded.
      CutShort: after the last frame: fewer than the file promises.
    """
    path = Path(path)
    count = 0
    with _opened(path) as capture:
        promised = _promised(capture)
        _check_size(path, *(int(capture.get(p)) for p in (cv2.CAP_PROP_FRAME_HEIGHT, cv2.CAP_PROP_FRAME_WIDTH)))
        while True:
            done, image = capture.read()
            if not done:
                break
            _check_size(path, *image.shape[:2])
            yield cv2.cvtColor(image, cv2.COLOR_BGR2GRAY) if image.ndim == 3 else image
            count += 1
    if not count and promised:
        raise InputError(f"{path}: none of its {promised} frames can be read: copy it again", status=1)
    if not count:
        raise InputError(f"{path} has no frames: record it again")
    if sentence := missing(path, read=count, promised=promised):
        raise CutShort(sentence)


def measure(frame: np.ndarray) -> tuple[float, float]:
    """Contrast and sharpness of a frame, uint8 [h, w].

    Returns:
      contrast: standard deviation of the grey levels, in levels.
      sharpness: standard deviation of the Laplacian relative to the contrast, both smoothed (sigma 1.5 px), because a
        camera's noise is sharp in a blurred frame too; without a unit, 0 for a frame without contrast. It depends on the
        pattern: compare frames of one plate.
    """
    contrast = float(frame.std())
    smooth = cv2.GaussianBlur(frame.astype(np.float32), (0, 0), _SMOOTHING_PX)
    # Below a tenth of a level there is rounding only.
    return contrast, float(cv2.Laplacian(smooth, cv2.CV_32F).std() / smooth.std()) if smooth.std() > 0.1 else 0.0


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[cv2.VideoCapture]:
    if not path.exists():
        raise InputError(f"{path} does not exist: check its name")
    if not path.is_file():
        raise InputError(f"{path} is not a file: name a video")
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check its permissions") from error
    if not any(head[at : at + len(mark)] == mark for at, mark in _CONTAINERS):
        raise InputError(f"{path} is not a video (AVI, MP4, MOV, Matroska, WebM, WMV, MPEG, Y4M): convert it")
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # FFmpeg's AV_LOG_QUIET; read once, with the first video
    options = "OPENCV_FFMPEG_CAPTURE_OPTIONS"
    before = os.environ.get(options)
    os.environ[options] = "fflags;discardcorrupt"  # else the rest of a frame that is cut off comes out grey
    try:
        capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    finally:
        if before is None:
            del os.environ[options]
        else:
            os.environ[options] = before
    try:
        if not capture.isOpened():
            raise InputError(
                f"{path} cannot be opened, so it is cut short or in a codec that is not known here: "
                "copy it again or convert it",
                status=1,
            )
        yield capture
    finally:
        capture.release()


def _check_size(path: Path, height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise InputError(f"{path} has frames of {width}x{height} pixels, more than {MAX_PIXELS}: record smaller ones")


def _promised(capture: cv2.VideoCapture) -> int:
    return max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))
