"""What feeds training: files read, patches cut, defects inserted, plates drawn."""

import functools
import itertools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from steel_ad.data import defects, folders, patches, plates
from steel_ad.ops.convolution import cpu_compiler_options
from steel_ad.studies.benchmark import peers
from steel_ad.studies.benchmark.timing import Maker, Program, Work, compiled

LINE = "teardrop1"


def works(*, tiny: bool) -> list[Work]:
    """`read_png_SIDE`, `crops_SIDE` (with flips), `insert_SIDE` and `render_SIDE`; FLOPs say nothing about their time."""
    files, page = (2, 64) if tiny else (16, 1024)
    images = functools.partial(_plates, files, page)
    pngs: dict[str, Maker] = {"steel_ad": functools.partial(_read, images), **peers.read_png(images)}
    found = [Work(f"read_png_{page}", None, 1.0 * files * page**2, pngs, {"mpx_s": files * page**2 / 1e6})]

    num, side = (4, 32) if tiny else (512, 128)
    crops: dict[str, Maker] = {
        "steel_ad": functools.partial(_crops, images, num, side),
        **peers.crops(images, num=num, side=side),
    }
    # A byte is read and a float32 written.
    found.append(Work(f"crops_{side}", None, 5.0 * num * side**2, crops, {"patches_s": num}))

    num, side, size = (2, 64, 64) if tiny else (64, 256, 128)
    good = functools.partial(_plates, num, side)
    library = functools.lru_cache(lambda: defects.procedural(jax.random.key(0), 6 if tiny else 60, size=size))
    inserts: dict[str, Maker] = {
        "steel_ad": functools.partial(_insert, good, library),
        **peers.insert(good, lambda: (np.asarray(library().difference), np.asarray(library().mask))),
    }
    # Read and written in float32, and the mask.
    found.append(Work(f"insert_{side}", None, 9.0 * num * side**2, inserts, {"images_s": num}))

    num = 1 if tiny else 16
    found.append(
        Work(
            f"render_{side}",
            None,
            4.0 * num * side**2,
            {"steel_ad": functools.partial(_render, num, side)},
            {"images_s": num},
        )
    )
    return found


@functools.lru_cache(maxsize=1)
def _plates(num: int, side: int) -> np.ndarray:
    """Plates of a line, uint8 `[num, side, side]`: a large one is a small one repeated, since drawing takes its time."""
    drawn = np.asarray(plates.to_uint8(plates.render(jax.random.key(0), LINE, min(side, 256), num)))
    return np.tile(drawn, (1, side // drawn.shape[1], side // drawn.shape[2]))


def _read(images: peers.Frames) -> Program:
    folder = tempfile.TemporaryDirectory()
    paths = write_pngs(Path(folder.name), images())

    def call():
        assert folder  # it lives as long as the program
        return folders.read_images(paths)

    return Program(call=call)


def write_pngs(folder: Path, images: np.ndarray) -> list[Path]:
    """The files written."""
    paths = [folder / f"{i:03d}.png" for i in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        folders.write_image(path, image)
    return paths


def _crops(images: peers.Frames, num: int, side: int) -> Program:
    data = jax.tree.map(jnp.asarray, patches.stack(list(images())))

    def draw(key, data):
        of_crops, of_flips = jax.random.split(key)
        crops = patches.random_crops(of_crops, data.sizes, num=num, patch_size=side)
        return patches.random_flips(of_flips, patches.cut(data, crops, patch_size=side))

    return _keyed(draw, data)


def _insert(good: peers.Frames, library) -> Program:
    images = jnp.asarray(good().astype(np.float32) / 255)
    return _keyed(lambda key, images, library: defects.insert(key, images, library), images, library())


def _render(num: int, side: int) -> Program:
    return _keyed(lambda key: plates.render(key, LINE, side, num))


def _keyed(function, *args) -> Program:
    """The program of `function(key, *args)`, which is called with another key every time, the first again after 1024."""
    keys = itertools.cycle(jax.random.split(jax.random.key(1), 2**10))
    program, compile_s, counted = compiled(
        jax.jit(function, compiler_options=cpu_compiler_options()), next(keys), *args
    )
    return Program(call=lambda: program(next(keys), *args), compile_s=compile_s, counted=counted)
