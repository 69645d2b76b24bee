"""What test_parallel.py starts in processes of its own: python -m tests.parallel_worker devices|process|late FOLDER [FLAGS]."""

import contextlib
import dataclasses
import re
import sys
import time
import types
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

from steel_ad import cli, files, losses, metrics, parallel
from steel_ad.config import Autoencoder, Segmentation
from steel_ad.data import defects, patches
from steel_ad.data.datasets import TestImage
from steel_ad.detectors import Detector, autoencoder, opened, segmentation
from steel_ad.models import layers, unet
from steel_ad.ops import convolution
from steel_ad.runs import evaluation
from steel_ad.train import loop
from steel_ad.train.checkpoint import Checkpoints
from steel_ad.train.resume import resume
from steel_ad.train.state import TrainState, create, stream
from steel_ad.train.step import make_step

CONFIG = Autoencoder(patch_size=32, latent=4, crops="fixed", num_crops=24, flips=True, batch_size=8, stride=32)
SAMPLES = Segmentation(patch_size=32, batch_size=8, blend="difference", defect_size=64, flips=True)
ADAM = optax.adam(1e-2)


def plates() -> patches.Plates:
    rng = np.random.default_rng(0)
    tile = (127 + 100 * np.sin(np.arange(48) / 3)).astype(np.uint8)
    return patches.stack(
        [np.minimum(tile[:, None], tile[None, :]) // 2 + rng.integers(0, 40, (48, 48), np.uint8) for _ in range(5)]
    )


def small_objective(params, extra, data, step, root):
    """A small autoencoder of the project's convolutions, in the parameters' dtype."""
    crops = patches.random_crops(stream(root, "crops", step), data.sizes, num=8, patch_size=32)
    x = patches.cut(data, parallel.split_batch(crops), patch_size=32).astype(params["in"].dtype)
    x = patches.random_flips(stream(root, "flips", step), x)
    y = jax.nn.leaky_relu(convolution.add_bias(convolution.halve(x, params["in"]), params["bias"]))
    return losses.l2(jax.nn.sigmoid(convolution.double(y, params["out"])), x).mean(), (extra, {})


def small_state(dtype=np.float32) -> TrainState:
    rng = np.random.default_rng(0)
    shapes = {"in": (4, 4, 1, 8), "bias": (1, 1, 1, 8), "out": (4, 4, 8, 1)}
    return create({name: rng.normal(0, 0.2, shape).astype(dtype) for name, shape in shapes.items()}, ADAM)


def train_small(state: TrainState, steps: int, *, mesh=None, on_step=None, save=None) -> TrainState:
    """Trains to `steps`, each one saved; the first one's gradient is in Adam's first moment."""
    mesh = mesh or parallel.mesh()
    state, data = parallel.put((state, plates()), parallel.replicated(mesh))
    step = make_step(small_objective, ADAM, mesh=mesh)

    def on_metrics(first, metrics):
        if on_step is not None:
            on_step(first + 1, {"loss": float(metrics["loss"][0])})

    return loop.run(step, state, data, jax.random.key(5), steps=steps, on_metrics=on_metrics, save=save, save_every=1)


def losses_in_float64(mesh) -> np.ndarray:
    with jax.enable_x64(True):
        seen: list[float] = []
        state = small_state(np.float64)
        assert all(p.dtype == np.float64 for p in state.params.values())
        train_small(state, 50, mesh=mesh, on_step=lambda _, row: seen.append(row["loss"]))
        return np.array(seen)


def samples(mesh) -> segmentation.Batch:
    """A batch of the supervised experiments with every random stream that they have."""
    library, _ = defects.fitting(defects.procedural(jax.random.key(1), 6, size=64), (32, 32))
    data = parallel.put(segmentation.Samples(plates(), library, 0.5, new_line=plates()), parallel.replicated(mesh))

    def draw(data, root):
        with parallel.inside(mesh):
            return segmentation.draw(SAMPLES, 0.5, data, jnp.int32(7), root)

    whole = parallel.replicated(mesh)
    return jax.jit(draw, in_shardings=whole, out_shardings=whole)(data, jax.random.key(3))


def normed() -> np.ndarray:
    """Images float32 `[8, 16, 16, 1]` of a brightness that differs from image to image."""
    images = np.random.default_rng(2).random((8, 16, 16, 1), np.float32)
    return images * np.arange(1, 9, dtype=np.float32)[:, None, None, None]


def batch_norm(mesh) -> dict:
    """Gradients of batch norm's own parameters and its running statistics after one step; the kernel is the identity."""
    layer, rule = layers.ConvNormRelu(1, size=1), optax.trace(0.0)

    def objective(params, extra, data, step, root):
        x = parallel.split_batch(data)
        y, updated = layer.apply({"params": params, **extra}, x, True, mutable=["batch_stats"])
        return jnp.mean(y * y * x), (dict(updated), {})

    variables = layer.init(jax.random.key(1), jnp.zeros((1, 16, 16, 1)), False)
    params = {**variables["params"], "kernel": jnp.ones((1, 1, 1, 1))}
    state = create(params, rule, {"batch_stats": variables["batch_stats"]})
    state, x = parallel.put((state, normed()), parallel.replicated(mesh))
    state, _ = make_step(objective, rule, mesh=mesh)(state, x, jax.random.key(0))
    return {"gradient": state.opt_state.trace["BatchNorm_0"], **state.extra["batch_stats"]["BatchNorm_0"]}


def unet_in_float64(mesh) -> dict[str, np.ndarray]:
    """Losses of 50 steps of a U-Net, with its batch norm over all devices, and metrics of the maps it makes then."""
    wide = types.SimpleNamespace(**{**vars(jnp), "float32": jnp.float64})  # the networks' own word for their precision
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.enable_x64(True))
        for module in (layers, unet):
            stack.enter_context(mock.patch.object(module, "jnp", wide))
        network = unet.UNet(width=2, dtype=np.float64)

        def objective(params, extra, data, step, root):
            crops = patches.random_crops(stream(root, "crops", step), data.sizes, num=8, patch_size=32)
            x = patches.cut(data, parallel.split_batch(crops), patch_size=32).astype(np.float64)
            (_, logits), updated = network.apply({"params": params, **extra}, x, train=True, mutable=["batch_stats"])
            loss = optax.sigmoid_binary_cross_entropy(logits, (x > 0.5).astype(np.float64))
            return loss.mean(), (dict(updated), {})

        variables = dict(network.init(jax.random.key(1), np.zeros((1, 32, 32, 1))))
        state = create(variables.pop("params"), ADAM, variables)
        assert all(p.dtype == np.float64 for p in jax.tree.leaves(state.params))
        state, data = parallel.put((state, plates()), parallel.replicated(mesh))
        step, seen = make_step(objective, ADAM, mesh=mesh), []
        state = loop.run(
            *(step, state, data, jax.random.key(5)),
            steps=50,
            on_metrics=lambda _, metrics: seen.append(float(metrics["loss"][0])),
            save=None,
            save_every=1,
        )
        trained = parallel.local(state)
        images = np.asarray(plates().pixels).reshape(5, 48, 48)[:, :32, :32]
        _, logits = network.apply({"params": trained.params, **trained.extra}, images[..., None] / 255)
        ranking = metrics.rank(np.asarray(logits)[..., 0], images > 140)
        measured = (metrics.pixel_auroc(ranking), metrics.aupro(ranking, 0.3), metrics.average_precision(ranking))
        return {"losses": np.array(seen), "metrics": np.array(measured)}


def parts() -> np.ndarray:
    """Two batches of eight."""
    return np.arange(2 * 8 * 3, dtype=np.uint8).reshape(2, 8, 3)


class Small(Detector):
    """The small autoencoder as a detector of what it cannot reconstruct."""

    name = "small"

    def fit(self, images):
        return small_state().params

    def residual(self, params, image):
        y = jax.nn.leaky_relu(
            convolution.add_bias(convolution.halve(image[None, :, :, None], params["in"]), params["bias"])
        )
        return jnp.abs(jax.nn.sigmoid(convolution.double(y, params["out"]))[0, :, :, 0] - image)


def measured(mesh) -> dict[str, float]:
    """Metrics and thresholds of the small autoencoder after ten steps, which depend on the order of processes' images too."""
    state = train_small(small_state(), 10, mesh=mesh)
    good = list(np.asarray(plates().pixels).reshape(5, 48, 48))
    test = []
    for i, image in enumerate(good):
        mask = np.zeros(image.shape, bool)
        mask[8 * i : 8 * i + 8, 20:28] = i % 2
        shown = np.where(mask, image // 2 + 60, image).astype(np.uint8)
        test.append(TestImage(name=f"{i}", kind="bad" if i % 2 else "good", image=shown, mask=mask))
    mapper = evaluation.Mapper(Small(), radius=1)
    limits = mapper.thresholds(state.params, good, 90, label="calibrate")[0]["small"]
    maps = mapper(state.params, [t.image for t in test], label="test")[0]["small"]
    return {**evaluation.measure(maps, test, limits), **dataclasses.asdict(limits)}


def observe(mesh) -> tuple[dict, TrainState]:
    """What must not depend on the number of devices, and a state to save."""
    state = train_small(small_state(), 1, mesh=mesh)
    images = [np.full((20 + i % 2, 24), 10 * i, np.uint8) for i in range(7)]
    means = opened.Program(lambda offset, pixels: opened.scaled(pixels).mean() + offset)(
        jnp.float32(1), images, label="means"
    )
    mine = parallel.spread_parts(parts()[:, parallel.part(8, mesh)], mesh)
    found = {
        "gradient": state.opt_state[0].mu,
        "float64": losses_in_float64(mesh),
        "means": np.array(means),
        "metrics": measured(mesh),
        "parts": jax.jit(lambda x: x, out_shardings=parallel.replicated(mesh))(mine),
    }
    return found, state


def collectives(mesh) -> list[str]:
    """Collective operations in the compiled step of the real network."""
    state = autoencoder.initial_state(CONFIG, jax.random.key(0))
    data = autoencoder.Good(plates(), patches.Crops(*(np.zeros(24, np.int32) for _ in range(3))))
    arguments = parallel.put((state, data), parallel.replicated(mesh))
    step = make_step(autoencoder.objective(CONFIG), autoencoder.optimizer(CONFIG), mesh=mesh)
    text = step.lower(*arguments, jax.random.key(3)).compile().as_text()
    names = "all-reduce|all-gather|all-to-all|ragged-all-to-all|reduce-scatter|collective-permute|collective-broadcast"
    return re.findall(rf" ({names})(?:-start)?\(", text)


def write(path: Path, tree) -> None:
    """Arrays by their path in the tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(at, simple=True, separator="/"): np.asarray(leaf) for at, leaf in leaves}
    if parallel.is_main():
        np.savez(path, **named)


def restored(folder: Path, mesh) -> TrainState:
    like = jax.tree.map(jnp.zeros_like, parallel.put(small_state(), parallel.replicated(mesh)))
    like = parallel.put(like, parallel.replicated(mesh))
    with Checkpoints(folder) as kept:
        state, _ = kept.restore(like)
    assert all(leaf.sharding.device_set == set(mesh.devices.flat) for leaf in jax.tree.leaves(state))
    return state


def devices(folder: Path) -> None:
    assert jax.device_count() == 8
    one, all_ = parallel.mesh(1), parallel.mesh()
    for name, mesh in (("1", one), ("8", all_)):
        found, state = observe(mesh)
        more = {"batch": samples(mesh)._asdict(), "norm": batch_norm(mesh), "unet": unet_in_float64(mesh)}
        write(folder / f"{name}.npz", {**found, **more})
    files.write_json(folder / "collectives.json", collectives(all_))
    with Checkpoints(folder / "c8") as kept:
        kept.save(1, state, {})
    write(folder / "saved_by_8.npz", state)
    for n in (1, 2):
        write(folder / f"restored_on_{n}.npz", restored(folder / "c8", parallel.mesh(n)))


def process(folder: Path) -> None:
    assert jax.local_device_count() == 1
    count = jax.process_count()
    found, state = observe(parallel.mesh())
    write(folder / f"processes_{count}.npz", found | ({"unet": unet_in_float64(parallel.mesh())} if count == 2 else {}))
    with Checkpoints(folder / f"c_processes_{count}") as kept:
        kept.save(1, state, {})
    write(folder / f"saved_by_processes_{count}.npz", state)
    write(folder / f"restored_by_processes_{count}.npz", restored(folder / f"c_processes_{count}", parallel.mesh()))
    files.write_text(folder / f"written_by_{jax.process_index()}", "")
    print("said by one", flush=True)
    if count == 2:
        mortal(folder / "mortal")


def late(folder: Path) -> None:
    """A sum over both processes, to which one comes later than Gloo waits for a connection."""
    mesh = parallel.mesh()
    total = jax.jit(jnp.sum, out_shardings=parallel.replicated(mesh))
    ones = parallel.put(np.ones(2, np.float32), parallel.spread(mesh))
    if not parallel.is_main():
        time.sleep(35)
    files.write_text(folder / "late", str(float(total(ones))))


def mortal(folder: Path, steps: int = 10**6) -> None:
    """Trains until somebody stops it."""
    resume(
        lambda state, history, on_step, save: train_small(state, steps, on_step=on_step, save=save),
        small_state(),
        folder,
        total_steps=steps,
        settings={},
    )


if __name__ == "__main__":
    mode = {"devices": devices, "process": process, "late": late}[sys.argv.pop(1)]
    target = Path(sys.argv.pop(1))
    cli.define_config(Autoencoder, "autoencoder", "tiny")
    cli.define_processes()
    cli.run(lambda: mode(target))
