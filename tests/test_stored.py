"""Images that stay in their files: the same patches, the same steps and the same thresholds as of those in memory."""

import dataclasses
import itertools
import multiprocessing
import os
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steel_ad import parallel
from steel_ad.config import Autoencoder
from steel_ad.data import datasets, folders, patches, workers
from steel_ad.data import images as stored
from steel_ad.data.images import Images
from steel_ad.detectors import autoencoder
from steel_ad.errors import InputError
from steel_ad.ops import convolution
from steel_ad.runs import evaluation
from steel_ad.train import feed, fit, loop, state, step
from steel_ad.train.stage import Stage

TINY = Autoencoder(
    patch_size=32,
    latent=4,
    crops="fresh",
    flips=True,
    batch_size=4,
    steps=6,
    learning_rate=1e-3,
    stride=32,
    checkpoint_every=2,
    data_path="grain",
)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    tile = (127 + 100 * np.sin(np.arange(60) / 3)).astype(np.uint8)
    shapes = [(32, 60), (48, 48), (48, 48), (60, 33), (48, 48)]
    return [np.minimum(tile[:h, None], tile[None, :w]) // 2 + rng.integers(0, 40, (h, w), np.uint8) for h, w in shapes]


@pytest.fixture
def files(images, tmp_path):
    (tmp_path / "data").mkdir()
    for i, image in enumerate(images):
        folders.write_image(tmp_path / "data" / f"{i}.png", image)
    return stored.read(folders.list_images(tmp_path / "data"), min_size=32, resident=-1)


@pytest.fixture
def here(monkeypatch):
    """Reads in this process, since processes take seconds to start."""
    monkeypatch.setattr(workers, "_workers", lambda: 0)


@pytest.fixture
def own_code(monkeypatch):
    """The code that XLA makes by default: its older emitters, with which the suite compiles, round what they fuse otherwise."""
    options = convolution.cpu_compiler_options() or {}
    if "fusion_emitters" in os.environ.get("XLA_FLAGS", ""):
        options = {**options, "xla_cpu_use_fusion_emitters": True}
    monkeypatch.setattr(step, "cpu_compiler_options", lambda: options or None)
    clear = fit._step.cache_clear
    clear()
    yield
    clear()


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def trained(config, images, **options):
    rows = []
    return autoencoder.train(config, images, on_step=lambda s, row: rows.append((s, row)), **options), rows


@pytest.mark.slow
@pytest.mark.usefixtures("own_code")
def test_worker_processes_give_the_steps_of_images_in_memory(files, images, monkeypatch):
    """To the bit: parameters, and the losses on the way; two processes for four batches, one for the last one."""
    monkeypatch.setattr(workers, "_workers", lambda: 2)
    monkeypatch.setattr(workers, "_PLACES", 5 * 4)
    (a, of_a), (b, of_b) = trained(TINY, files), trained(TINY, patches.stack(images))
    same(a, b)
    assert of_a == of_b
    assert len(of_a) == 6


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_in_a_sentence(files):
    def kill(s, row):
        if s == 3:
            for worker in multiprocessing.active_children():
                worker.kill()

    with pytest.raises(InputError, match="a process that reads images has been ended") as error:
        autoencoder.train(dataclasses.replace(TINY, steps=400), files, on_step=kill)
    assert error.value.status == 1
    assert not multiprocessing.active_children()


def test_a_run_that_ends_at_once_says_nothing_of_semaphores(files, tmp_path):
    script = f"""
import os
import numpy as np
from steel_ad.data import folders, images, workers
images = images.read(folders.list_images({str(tmp_path / "data")!r}), min_size=32, resident=-1)
places = lambda first, count: np.zeros((count, 1, 3), np.int32)
batches = workers.batches(images, places, first=0, total=50, size=1, patch_size=32)
next(batches)
os._exit(3)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 3, done.stderr
    assert "resource_tracker" not in done.stderr


@pytest.mark.usefixtures("here")
def test_the_stream_depends_on_the_step_alone(files, images, monkeypatch):
    """Fixed crops over several epochs, in several portions, and begun in mid-epoch."""
    monkeypatch.setattr(workers, "_PLACES", 9)  # two batches of four
    config = dataclasses.replace(TINY, crops="fixed", num_crops=13, steps=7, checkpoint_every=3)
    root, mesh = jax.random.key(config.seed), parallel.mesh()
    resident = jax.tree.map(jnp.asarray, autoencoder.good(config, patches.stack(images), root))

    def expected(s):
        places = autoencoder.choose(config, resident, jnp.int32(s), root)
        return feed.cut(resident, places, patch_size=32)["images"]

    for first in (0, 4):
        data = autoencoder.good(config, files, root)
        calls = feed.calls(autoencoder.stage(config), data, root, first=first, mesh=mesh)
        read = np.concatenate([call.images.pixels for call in calls])
        np.testing.assert_array_equal(read, [expected(s) for s in range(first, 7)])


def test_sets_in_files_are_cut_where_a_sample_looks_and_nowhere_else(here, files, images, monkeypatch):
    """Two sets of which a sample looks at one or none, several steps a call; one more set on the device; other data as it is."""

    class Two(NamedTuple):
        a: object
        resident: object
        b: object
        numbers: object

    def choose(data, step, root):
        of = jnp.arange(3, dtype=jnp.int32)
        crops = patches.Crops((of + step) % data.numbers, jnp.minimum(of, 0), of)
        return {
            "b": crops._replace(image=jnp.where(of == 1, crops.image, -1)),
            "resident": crops,
            "a": crops._replace(image=jnp.where(of == 2, crops.image, -1)),
        }

    data = Two(files, Images(images), files.take(np.array([1, 4, 2])), np.int32(3))
    of = dataclasses.replace(autoencoder.stage(TINY), choose=choose, steps=6, batch_size=3, patch_size=30)
    monkeypatch.setattr(Stage, "steps_per_call", 2)
    found = list(feed.calls(of, data, jax.random.key(0), first=2, mesh=parallel.mesh()))
    assert [call.a.pixels.shape for call in found] == [(2, 3, 30, 30)] * 2
    assert all(isinstance(call.resident, patches.Plates) and int(call.numbers) == 3 for call in found)
    np.testing.assert_array_equal(found[0].b.sizes, [[48, 48]] * 3)
    for i, step_ in enumerate(range(2, 6)):
        a, b = (np.asarray(s.pixels)[i % 2] for s in (found[i // 2].a, found[i // 2].b))
        np.testing.assert_array_equal(a[2], images[(2 + step_) % 3][:30, 2:32])
        np.testing.assert_array_equal(b[1], images[[1, 4, 2][(1 + step_) % 3]][:30, 1:31])
        assert not a[:2].any()
        assert not b[[0, 2]].any()


@pytest.mark.slow
@pytest.mark.usefixtures("here", "own_code")
def test_resumed_training_is_that_of_images_in_memory(files, images):
    whole = autoencoder.train(TINY, patches.stack(images))
    half = []

    def stop(s, now):
        if s == 4:
            half.append(jax.device_get(now))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        autoencoder.train(TINY, files, save=stop)
    end, rows = trained(TINY, files, state=jax.tree.map(jnp.asarray, half[0]))
    same(end, whole)
    assert [s for s, _ in rows] == [5, 6]


def test_several_steps_a_call_take_a_batch_each():
    """Both forms of a step, by a model whose updates are the batches' sums times the step; a part of the data stays as it is."""

    def objective(params, extra, data, step, root):
        batch, (sign, missing) = data
        assert missing is None
        assert batch.sizes.shape == (1, 2)
        weight = sign * (step + 1) * jnp.sum(batch.pixels, dtype=jnp.int32)
        return params["w"] * weight.astype(jnp.float32), (extra, {"number": step.astype(jnp.float32)})

    batches = np.arange(6 * 2 * 3, dtype=np.uint8).reshape(6, 2, 3)
    mesh, ends = parallel.mesh(), []
    for per_call in (1, 3):
        run = step.make_step(objective, optax.sgd(1.0), steps_per_call=per_call, mesh=mesh)
        now = state.create({"w": jnp.zeros(())}, optax.sgd(1.0))
        sign = parallel.put(jnp.int32(-1), parallel.replicated(mesh))
        parts = (parallel.spread_parts(b, mesh) for b in np.split(batches, 6 // per_call))
        calls = ((patches.Streamed(part, np.ones((1, 2), np.int32)), (sign, None)) for part in parts)
        numbers = []
        now = loop.run(
            run,
            parallel.put(now, parallel.replicated(mesh)),
            calls,
            jax.random.key(0),
            steps=6,
            steps_per_call=per_call,
            on_metrics=lambda _, m, numbers=numbers: numbers.extend(m["number"]),
        )
        assert numbers == list(range(6))
        ends.append(float(now.params["w"]))
    assert ends == [sum((s + 1) * float(b.sum()) for s, b in enumerate(batches))] * 2


@pytest.mark.parametrize("what", ["gone", "another"])
def test_a_file_that_changes_ends_in_a_sentence(files, here, what, tmp_path):
    if what == "gone":
        (tmp_path / "data" / "0.png").unlink()
    else:
        folders.write_image(tmp_path / "data" / "0.png", np.zeros((60, 32), np.uint8))
    with pytest.raises(InputError, match=r"0\.png (does not exist|has changed)") as error:
        autoencoder.train(dataclasses.replace(TINY, steps=40), files)
    assert error.value.status == 2


def test_what_does_not_fit_stays_in_its_files(files, images, tmp_path):
    root = tmp_path / "data"
    size = sum(image.nbytes for image in images)
    for resident, kept in ((size, False), (size - 1, True), (-1, True)):
        found = datasets.load(str(root), min_size=32, resident=resident).train
        assert found.stored is kept
        assert found.sizes.tolist() == [list(image.shape) for image in images]
        assert (found.sizes.dtype, found.num_pixels) == (np.int32, size)
        for a, b in zip(found, images, strict=True):
            np.testing.assert_array_equal(a, b)
    taken = found.take(np.array([3, 1]))
    assert taken.stored
    same([*taken], [images[3], images[1]])
    with pytest.raises(InputError, match=r"0\.png.*smaller than the patch of 48"):
        datasets.load(str(root), min_size=48, resident=-1)
    with pytest.raises(InputError, match="drawn, not read from files"):
        datasets.load("procedural/diamond", resident=-1)
    assert dataclasses.replace(TINY, data_path="auto", resident_mb=2).resident_bytes == 2e6
    assert dataclasses.replace(TINY, data_path="device").resident_bytes == float("inf")


def test_stored_test_images(images, tmp_path):
    for kind in ("good", "scratch"):
        (tmp_path / "test" / kind).mkdir(parents=True)
    (tmp_path / "ground_truth" / "scratch").mkdir(parents=True)
    folders.write_image(tmp_path / "test" / "good" / "0.png", images[1])
    folders.write_image(tmp_path / "test" / "scratch" / "0.png", images[0])
    folders.write_image(tmp_path / "ground_truth" / "scratch" / "0_mask.png", (images[0] > 99).astype(np.uint8))
    here, there = (datasets.load(str(tmp_path), train=False, resident=r).test for r in (float("inf"), 0))
    assert datasets.images_of(there).stored
    assert [(t.name, t.kind) for t in there] == [(t.name, t.kind) for t in here]
    same([t.mask for t in there], [t.mask for t in here])
    same([t.image for t in there], [*datasets.images_of(there)])
    same([t.image for t in there], [t.image for t in here])


@pytest.mark.parametrize("percentile", [0.0, 37.0, 98.0, 99.97, 100.0])
def test_the_tail_gives_numpys_percentile(percentile):
    rng = np.random.default_rng(0)
    for total, parts in itertools.product((1, 2, 1001), (1, 7)):
        values = rng.normal(size=total).astype(np.float32)
        values[::3] = values[0]  # ties
        tail = evaluation.Tail(total, percentile)
        for part in np.array_split(values, parts):
            tail.add(part)
        assert tail.percentile() == np.percentile(values.astype(np.float64), percentile)


def test_the_tail_keeps_no_more_than_it_needs():
    tail = evaluation.Tail(100_000, 98.0)
    for part in np.split(np.random.default_rng(0).normal(size=100_000).astype(np.float32), 100):
        tail.add(part)
        assert sum(map(len, tail._kept)) <= 1.2 * 2001 + 1000


def test_thresholds_without_maps(files, images):
    config = dataclasses.replace(TINY, stride=16)
    params = autoencoder.initial_state(config, jax.random.key(0)).params
    mapper = evaluation.Mapper(autoencoder.AutoencoderDetector(config).only("l2"), 1)
    whole = evaluation.thresholds(mapper(params, images[1:3], label="maps")[0]["l2"], 90.0)
    few = files.take(np.array([1, 2]))
    assert mapper.thresholds(params, few, 90.0, label="calibrate") == ({"l2": whole}, None)


def test_grain_is_imported_only_where_it_is_used():
    code = "import sys, steel_ad.data.workers; sys.exit('grain' in sys.modules)"  # its one owner
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
