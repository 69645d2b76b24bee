"""What test_parallel.py starts in processes of its own: python parallel_worker.py devices|process|mortal FOLDER [FLAGS]."""

import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from steel_ad import cli, losses, parallel
from steel_ad.config import Autoencoder, Segmentation
from steel_ad.data import defects, patches
from steel_ad.detectors import autoencoder, segmentation
from steel_ad.models import blocks
from steel_ad.ops import convolution
from steel_ad.studies import runs
from steel_ad.train.checkpoint import Checkpoints
from steel_ad.train.state import TrainState, create, stream
from steel_ad.train.step import make_step

CONFIG = Autoencoder(
    patch_size=32, latent=4, crops="fresh", flips=True, batch_size=8, steps=2, stride=32, checkpoint_every=1
)
SAMPLES = Segmentation(patch_size=32, batch_size=8, blend="difference", defect_size=64, flips=True)


def plates() -> patches.Plates:
    rng = np.random.default_rng(0)
    tile = (127 + 100 * np.sin(np.arange(48) / 3)).astype(np.uint8)
    return patches.stack(
        [np.minimum(tile[:, None], tile[None, :]) // 2 + rng.integers(0, 40, (48, 48), np.uint8) for _ in range(5)]
    )


def step_of(mesh) -> tuple:
    """The autoencoder's step, whose optimizer does nothing but keep the gradient, and its arguments."""
    rule = optax.trace(0.0)
    step = make_step(autoencoder.objective(CONFIG), rule, mesh=mesh)
    params = autoencoder.initial_state(CONFIG, jax.random.key(0)).params
    state, data = parallel.put((create(params, rule), plates()), parallel.replicated(mesh))
    return step, (state, data, jax.random.key(3))


def samples(mesh) -> segmentation.Batch:
    """A batch of the supervised experiments, every stream of theirs drawn."""
    library = defects.procedural(jax.random.key(1), 6, size=64)
    library, _ = defects.fitting(library, (32, 32))
    data = parallel.put(segmentation.Samples(plates(), library, new_line=plates()), parallel.replicated(mesh))

    def draw(data, root):
        with parallel.inside(mesh):
            return segmentation.draw(SAMPLES, 0.5, data, jnp.int32(7), root)

    whole = parallel.replicated(mesh)
    return jax.jit(draw, in_shardings=whole, out_shardings=whole)(data, jax.random.key(3))


def batch_norm(mesh) -> dict:
    """Running statistics after one step of a network with batch norm."""
    layer = blocks.ConvNormRelu(3)

    def objective(params, extra, data, step, root):
        x = parallel.split_batch(data)
        y, updated = layer.apply({"params": params, **extra}, x, True, mutable=["batch_stats"])
        return jnp.mean(y * y), (dict(updated), {})

    x = jax.random.uniform(jax.random.key(0), (8, 16, 16, 1)) * jnp.arange(1.0, 9.0).reshape(8, 1, 1, 1)
    variables = layer.init(jax.random.key(1), x, False)
    rule = optax.trace(0.0)
    state = create(variables["params"], rule, {"batch_stats": variables["batch_stats"]})
    state, x = parallel.put((state, x), parallel.replicated(mesh))
    state, _ = make_step(objective, rule, mesh=mesh)(state, x, jax.random.key(0))
    return {"gradient": state.opt_state.trace, "statistics": state.extra}


def losses_in_float64(mesh, steps: int = 50) -> np.ndarray:
    """Losses of training a small autoencoder of the project's convolutions, in double precision."""
    with jax.enable_x64(True):

        def objective(params, extra, data, step, root):
            crops = patches.random_crops(stream(root, "crops", step), data, num=8, patch_size=32)
            x = patches.cut(data, parallel.split_batch(crops), patch_size=32).astype(jnp.float64)
            x = patches.random_flips(stream(root, "flips", step), x)
            y = jax.nn.leaky_relu(convolution.add_bias(convolution.halve(x, params["in"]), params["bias"]))
            y = jax.nn.sigmoid(convolution.double(convolution.same(y, params["same"]), params["out"]))
            return losses.ssim(y, x).mean(), (extra, {})

        rng = np.random.default_rng(0)
        shapes = {"in": (4, 4, 1, 8), "bias": (1, 1, 1, 8), "same": (3, 3, 8, 8), "out": (4, 4, 8, 1)}
        params = {name: rng.normal(0, 0.2, shape) for name, shape in shapes.items()}
        rule = optax.adam(1e-2)
        state, data = parallel.put((create(params, rule), plates()), parallel.replicated(mesh))
        step = make_step(objective, rule, mesh=mesh)
        seen = []
        for _ in range(steps):
            state, metrics = step(state, data, jax.random.key(5))
            assert metrics["loss"].dtype == jnp.float64
            seen.append(metrics["loss"])
        return np.concatenate(jax.device_get(seen))


def observe(mesh) -> dict[str, np.ndarray]:
    step, arguments = step_of(mesh)
    state, metrics = step(*arguments)
    found = {
        "loss": metrics["loss"],
        "gradient": state.opt_state.trace,
        "batch": samples(mesh)._asdict(),
        "norm": batch_norm(mesh),
        "float64": losses_in_float64(mesh),
    }
    leaves = jax.tree_util.tree_leaves_with_path(found)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def collectives(mesh) -> np.ndarray:
    """Names of the collective operations in the compiled step."""
    step, arguments = step_of(mesh)
    text = step.lower(*arguments).compile().as_text()
    pattern = r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast)(?:-start)?\("
    return np.array(re.findall(pattern, text))


def trained(folder: Path, mesh) -> TrainState:
    """Two steps, the checkpoint of the last one in `folder`."""
    with Checkpoints(folder) as kept:
        return autoencoder.train(CONFIG, plates(), mesh=mesh, save=lambda s, now: kept.save(s, now, {}))


def restored(folder: Path, mesh) -> TrainState:
    like = parallel.put(autoencoder.initial_state(CONFIG, jax.random.key(9)), parallel.replicated(mesh))
    with Checkpoints(folder) as kept:
        state, _ = kept.restore(like)
    assert all(leaf.sharding.is_equivalent_to(parallel.replicated(mesh), leaf.ndim) for leaf in jax.tree.leaves(state))
    return state


def leaves(state: TrainState) -> dict[str, np.ndarray]:
    return {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}


def devices(folder: Path) -> None:
    assert jax.device_count() == 8
    one, all_ = parallel.mesh(1), parallel.mesh()
    np.savez(folder / "1.npz", **observe(one))
    np.savez(folder / "8.npz", **observe(all_), collectives=collectives(all_))
    np.savez(folder / "saved.npz", **leaves(trained(folder / "c8", all_)))
    for n in (1, 2):
        np.savez(folder / f"restored{n}.npz", **leaves(restored(folder / "c8", parallel.mesh(n))))


def process(folder: Path) -> None:
    assert (jax.process_count(), jax.local_device_count()) == (2, 1)
    found = observe(parallel.mesh())
    saved = leaves(trained(folder / "c2", parallel.mesh()))
    again = leaves(restored(folder / "c2", parallel.mesh()))
    if parallel.is_main():
        np.savez(folder / "processes.npz", **found)
        np.savez(folder / "saved_by_two.npz", **saved)
        np.savez(folder / "restored_by_two.npz", **again)
    print("only process 0 says this")


def mortal(folder: Path) -> None:
    """Trains until somebody stops it."""
    config = Autoencoder(**{**CONFIG.__dict__, "steps": 10**6})
    (folder / f"alive{jax.process_index()}").touch()
    runs.fit(
        lambda state, on_step, save: autoencoder.train(config, plates(), state=state, on_step=on_step, save=save),
        autoencoder.initial_state(config, jax.random.key(0)),
        folder,
        total_steps=config.steps,
        settings={},
    )


if __name__ == "__main__":
    mode = {"devices": devices, "process": process, "mortal": mortal}[sys.argv.pop(1)]
    target = Path(sys.argv.pop(1))
    cli.define_config("configs/autoencoder.py:tiny")
    cli.run(lambda: mode(target))
