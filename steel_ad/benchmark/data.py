"""What feeds training: files read, patches cut, defects inserted, plates drawn; and training fed from files."""

import dataclasses
import functools
import itertools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from steel_ad import config as configs
from steel_ad import parallel
from steel_ad.benchmark import train
from steel_ad.benchmark.peers import arrays
from steel_ad.benchmark.timing import Frames, Maker, Program, Work, compiled
from steel_ad.data import defects, folders, patches, plates
from steel_ad.data import images as data_images
from steel_ad.detectors import autoencoder
from steel_ad.detectors.autoencoder import Good
from steel_ad.ops.convolution import cpu_compiler_options
from steel_ad.train import feed
from steel_ad.train.fit import step_of

LINE = "teardrop1"


def works(*, tiny: bool) -> list[Work]:
    """`read_png_SIDE`, `crops_SIDE` (with flips), `insert_SIDE`, `render_SIDE` and `train_from_files_bBATCH`; of all but the last
    FLOPs say nothing."""
    files, page = (2, 64) if tiny else (16, 1024)
    images = functools.partial(_plates, files, page)
    pngs: dict[str, Maker] = {
        "steel_ad": functools.partial(_read, images),
        "cv2": functools.partial(arrays.cv2_read, images),
    }
    found = [Work(f"read_png_{page}", None, 1.0 * files * page**2, pngs, {"mpx_s": files * page**2 / 1e6})]

    num, side = (4, 32) if tiny else (512, 128)
    crops: dict[str, Maker] = {
        "steel_ad": functools.partial(_crops, images, num, side),
        "numpy": functools.partial(arrays.numpy_crops, images, num, side),
    }
    # A byte is read and a float32 written.
    found.append(Work(f"crops_{side}", None, 5.0 * num * side**2, crops, {"patches_s": num}))

    num, side, size = (2, 64, 64) if tiny else (64, 256, 128)
    good = functools.partial(_plates, num, side)
    library = functools.lru_cache(lambda: defects.procedural(jax.random.key(0), 6 if tiny else 60, size=size))
    inserts: dict[str, Maker] = {
        "steel_ad": functools.partial(_insert, good, library),
        "numpy": functools.partial(
            arrays.numpy_insert, good, lambda: (np.asarray(library().difference), np.asarray(library().mask))
        ),
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

    config = configs.Autoencoder(crops="fresh", flips=True, batch_size=16, steps=10**6, checkpoint_every=1000)
    if tiny:
        config = dataclasses.replace(config, batch_size=4, patch_size=16, latent=4, stride=16)
    files, side = (4, 32) if tiny else (2048, 256)
    fed: dict[str, Maker] = {
        "steel_ad": functools.partial(_from_files, config, files, side),
        "steel_ad_in_memory": functools.partial(_in_memory, config, files, side),
    }
    # Long enough that what had been read ahead before a block does not matter: 8 calls a worker, of up to 20 steps.
    block_s = 5.0 if jax.default_backend() == "cpu" else 30.0
    work = f"train_from_files_b{config.batch_size}"
    found.append(Work(work, *train.cost(config), fed, {"patches_s": config.batch_size}, block_s))
    return found


@functools.lru_cache(maxsize=1)
def _plates(num: int, side: int) -> np.ndarray:
    """Plates of a line, uint8 `[num, side, side]`: a large one is a small one repeated, since drawing takes its time."""
    drawn = np.asarray(plates.to_uint8(plates.render(jax.random.key(0), LINE, min(side, 256), num)))
    return np.tile(drawn, (1, side // drawn.shape[1], side // drawn.shape[2]))


def _read(images: Frames) -> Program:
    folder = tempfile.TemporaryDirectory()
    paths = write_pngs(Path(folder.name), images())

    return Program(call=lambda: folders.read_images(paths), close=folder.cleanup)


def write_pngs(folder: Path, images: np.ndarray) -> list[Path]:
    """The files written."""
    paths = [folder / f"{i:03d}.png" for i in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        folders.write_image(path, image)
    return paths


def _from_files(config: configs.Autoencoder, files: int, side: int) -> Program:
    folder = tempfile.TemporaryDirectory()
    paths = write_pngs(Path(folder.name), _repeated(files, side))
    images = data_images.read(paths, min_size=config.patch_size, resident=-1)
    root = jax.random.key(0)
    state, data = autoencoder.initial_state(config, root), autoencoder.good(config, images, root)
    stage, mesh = autoencoder.stage(config), parallel.mesh(1)
    step, batches = step_of(stage, mesh), feed.calls(stage, data, root, first=0, mesh=mesh)
    program, compile_s, _ = compiled(step, state, next(batches), root)

    def call():
        nonlocal state
        state, metrics = program(state, next(batches), root)
        return metrics

    def close():
        batches.close()
        folder.cleanup()

    return Program(call=call, works=stage.steps_per_call, compile_s=compile_s, close=close)


def _in_memory(config: configs.Autoencoder, files: int, side: int) -> Program:
    plates = patches.stack(list(_repeated(files, side)))
    state = autoencoder.initial_state(config, jax.random.key(0))
    return train.stepping(autoencoder.objective(config), autoencoder.optimizer(config), state, Good(plates), config)


def _repeated(num: int, side: int) -> np.ndarray:
    """Of 64 plates, or of fewer, so many."""
    distinct = _plates(min(num, 64), side)
    return distinct[np.arange(num) % len(distinct)]


def _crops(images: Frames, num: int, side: int) -> Program:
    data = jax.tree.map(jnp.asarray, patches.stack(list(images())))

    def draw(key, data):
        of_crops, of_flips = jax.random.split(key)
        crops = patches.random_crops(of_crops, data.sizes, num=num, patch_size=side)
        return patches.random_flips(of_flips, patches.cut(data, crops, patch_size=side))

    return _keyed(draw, data)


def _insert(good: Frames, library) -> Program:
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
