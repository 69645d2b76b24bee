"""Step, loop and checkpoints: no retracing, exact resume, and runs that go wrong."""

import dataclasses
import gc
import sys
import time
import zlib
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steel_ad import config as configs
from steel_ad import parallel
from steel_ad.cli import without_closed_loops
from steel_ad.config import Autoencoder
from steel_ad.data import patches
from steel_ad.detectors import autoencoder
from steel_ad.errors import InputError
from steel_ad.train import loop, optimizers, resume, state, step
from steel_ad.train.checkpoint import Checkpoints

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
)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    tile = (127 + 100 * np.sin(np.arange(48) / 3)).astype(np.uint8)
    return [np.minimum(tile[:, None], tile[None, :]) // 2 + rng.integers(0, 40, (48, 48), np.uint8) for _ in range(5)]


@pytest.fixture(scope="module")
def plates(images):
    return patches.stack(images)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def test_streams_are_named_and_numbered():
    root = jax.random.key(0)
    draw = [jax.random.bits(state.stream(root, name, s)).item() for name in ("crops", "flips") for s in (0, 1)]
    assert len(set(draw)) == 4
    assert draw[0] == jax.random.bits(state.stream(root, "crops", jnp.int32(0))).item()
    by_hand = jax.random.fold_in(jax.random.fold_in(root, np.uint32(zlib.crc32(b"crops"))), 0)
    assert state.stream(root, "crops") == by_hand


@pytest.mark.parametrize("crops", ["fresh", "fixed"])
def test_a_step_never_compiles_twice(plates, crops):
    config = dataclasses.replace(TINY, crops=crops, num_crops=12)
    train_step = step.make_step(autoencoder.objective(config), autoencoder.optimizer(config))
    root = jax.random.key(0)
    now = autoencoder.initial_state(config, root)
    data = autoencoder.good(config, plates, root)
    now, data = parallel.put((now, data), parallel.replicated(parallel.mesh()))
    for _ in range(4):
        before = now
        now, _ = train_step(now, data, root)
    assert train_step._cache_size() == 1
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params))  # donated


@pytest.mark.slow
def test_many_steps_a_call_are_the_same_steps(plates):
    """`lax.scan` over steps draws the same numbers as steps one by one."""
    root, data = jax.random.key(0), jax.tree.map(jnp.asarray, autoencoder.Good(plates))
    ends = []
    for per_call in (1, 3):
        train_step = step.make_step(autoencoder.objective(TINY), autoencoder.optimizer(TINY), steps_per_call=per_call)
        now = autoencoder.initial_state(TINY, root)
        seen: list[float] = []
        now = loop.run(
            train_step,
            now,
            data,
            root,
            steps=6,
            steps_per_call=per_call,
            on_metrics=lambda _, m, seen=seen: seen.extend(m["loss"]),
        )
        ends.append((now, seen))
    assert len(ends[0][1]) == 6
    np.testing.assert_allclose(ends[0][1], ends[1][1], rtol=1e-4)
    assert int(ends[1][0].step) == 6


def test_fixed_crops_are_each_seen_once_an_epoch(plates):
    config = dataclasses.replace(TINY, crops="fixed", num_crops=8, flips=False)
    kept = patches.Crops(jnp.zeros(8, jnp.int32), jnp.arange(8), jnp.zeros(8, jnp.int32))
    seen = []

    def spy(y, x):
        jax.debug.callback(lambda a: seen.extend(np.asarray(a)), x[:, 0, 0, 0])
        return jnp.mean((y - x) ** 2, axis=(1, 2, 3))

    image = np.arange(39, dtype=np.uint8)[:, None].repeat(32, 1)
    data = autoencoder.Good(jax.tree.map(jnp.asarray, patches.stack([image])), kept)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(autoencoder.losses.LOSSES, "spy", spy)
        objective = autoencoder.objective(dataclasses.replace(config, loss="spy"))
        params = autoencoder.initial_state(config, jax.random.key(0)).params
        for s in range(4):
            jax.block_until_ready(jax.jit(objective)(params, {}, data, jnp.int32(s), jax.random.key(0)))
    jax.effects_barrier()
    epochs = np.rint(np.array(seen) * 255).astype(int).reshape(2, 8)
    assert [sorted(e) for e in epochs.tolist()] == [list(range(8))] * 2
    assert epochs[0].tolist() != epochs[1].tolist()


def test_resumed_training_is_bit_identical(plates, tmp_path):
    whole = autoencoder.train(TINY, plates)
    with Checkpoints(tmp_path / "c") as kept:

        def save(s, now):
            kept.save(s, now, {"seconds": float(s)})
            if s == 4:
                kept.wait()
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            autoencoder.train(TINY, plates, save=save)
    with Checkpoints(tmp_path / "c") as kept:
        assert kept.latest() == 4
        resumed, record = kept.restore(autoencoder.initial_state(TINY, jax.random.key(9)))
    assert record == {"seconds": 4.0}
    steps = []
    same(autoencoder.train(TINY, plates, state=resumed, on_step=lambda s, _: steps.append(s)), whole)
    assert steps == [5, 6]


def test_the_seed_decides(plates):
    same(autoencoder.train(TINY, plates), autoencoder.train(TINY, plates))
    other = autoencoder.train(dataclasses.replace(TINY, seed=1), plates)
    a, b = (jax.tree.leaves(t.params)[0] for t in (autoencoder.train(TINY, plates), other))
    assert not np.array_equal(a, b)


def test_loss_that_is_not_finite_stops_before_it_is_saved(plates):
    saved = []
    config = dataclasses.replace(TINY, learning_rate=1e30, loss="l2", steps=20)
    with pytest.raises(InputError, match=r"not finite at step \d+") as error:
        autoencoder.train(config, plates, save=lambda s, now: saved.append(now.params))
    assert error.value.status == 1
    assert all(np.isfinite(leaf).all() for params in saved for leaf in jax.tree.leaves(params))


def test_a_gradient_that_is_not_finite_is_never_saved():
    saved = []

    def fake(s, data, root):
        spoilt = float("nan") if int(s.step) == 2 else 1.0
        metrics = {"loss": jnp.ones(1), "gradient_norm": jnp.array([spoilt])}
        return state.TrainState(s.step + 1, {"w": jnp.array(spoilt)}, {}, {}), metrics

    start = state.create({"w": jnp.ones(())}, optax.identity())
    with pytest.raises(InputError, match="step 3"):
        loop.run(
            fake,
            start,
            None,
            None,
            steps=5,
            on_metrics=lambda *_: None,
            save=lambda s, _: saved.append(s),
            save_every=1,
        )
    assert saved == [1, 2]


def test_a_dead_run_is_noticed(plates):
    watch = autoencoder.DeadRun(dataclasses.replace(TINY, steps=1000))
    for s in range(1, 300):
        watch(s, {"contrast": 0.001})
    watch(300, {"contrast": 0.5})  # a contrast once in a while is life
    for s in range(301, 601):
        watch(s, {"contrast": 0.001})
    with pytest.raises(InputError, match="since step 301"):
        watch(601, {"contrast": 0.001})
    assert autoencoder.DeadRun(dataclasses.replace(TINY, steps=3000)).patience == 600  # a fifth
    short = autoencoder.DeadRun(dataclasses.replace(TINY, steps=60))
    for s in range(1, 60):
        short(s, {"contrast": 0.0})
    with pytest.raises(InputError, match="since step 1"):  # the end is no escape
        short(60, {"contrast": 0.0})


@pytest.mark.parametrize("killed", [250, 330, 599])
def test_a_dead_run_is_noticed_at_the_same_step_over_a_restart(killed):
    config = dataclasses.replace(TINY, steps=1000)
    rows = [{"step": s, "contrast": 0.5 if s == 300 else 0.001} for s in range(1, 602)]
    for watch in (autoencoder.DeadRun(config), autoencoder.DeadRun(config, rows[:killed])):
        for row in rows[killed if watch.flat_since else 0 : -1]:
            watch(row["step"], row)
        with pytest.raises(InputError, match="since step 301"):
            watch(601, {"contrast": 0.001})
    recovered = [*rows, {"step": len(rows) + 1, "contrast": 0.02}]
    assert autoencoder.DeadRun(config, recovered).flat_since is None
    assert (
        autoencoder.DeadRun(config, [{"step": 1, "loss": 3.0}]).flat_since is None
    )  # of a run before there was a contrast


def test_a_dead_run_that_is_killed_and_started_again_still_ends(plates, tmp_path, monkeypatch):
    monkeypatch.setattr(autoencoder, "_FLAT", 1e9)  # every reconstruction is flat
    config = dataclasses.replace(TINY, steps=60, checkpoint_every=20)

    def start(folder, kind, killed=None):
        seen = []

        def train(*, on_step, **rest):
            def spy(s, row):
                on_step(s, row)
                seen.append(s)
                if s == killed:
                    raise KeyboardInterrupt

            return autoencoder.train(config, plates, on_step=spy, **rest)

        begun = autoencoder.initial_state(config, jax.random.key(0))
        with pytest.raises(kind) as error:
            resume.resume(train, begun, tmp_path / folder, total_steps=60, settings={})
        return seen, str(error.value)

    whole, said = start("undisturbed", InputError)
    assert whole == list(range(1, 61))
    assert "since step 1 " in said
    start("killed", KeyboardInterrupt, killed=45)
    assert start("killed", InputError) == (list(range(41, 61)), said)


@jax.numpy_dtype_promotion("standard")
def test_both_decays_and_clipping_do_something():
    params = {"w": jnp.ones(3)}
    grads = {"w": jnp.array([0.0, 3.0, 4.0])}

    def updates(steps=3, **settings):
        rule = autoencoder.optimizer(dataclasses.replace(TINY, weight_decay=0.0, **settings))
        opt = rule.init(params)
        for _ in range(steps):
            delta, opt = rule.update(grads, opt, params)
        return np.asarray(delta["w"]), opt

    plain, _ = updates()
    np.testing.assert_allclose(plain, [0, -1e-3, -1e-3], rtol=1e-3)
    l2 = autoencoder.optimizer(dataclasses.replace(TINY, weight_decay=0.5, decay="l2"))
    delta, _ = l2.update(grads, l2.init(params), params)
    assert float(delta["w"][0]) == pytest.approx(-1e-3, rel=1e-3)  # the decay is in the gradient, so Adam scales it
    slower = autoencoder.optimizer(dataclasses.replace(TINY, weight_decay=1.0, decay="learning_rate"))
    opt = slower.init(params)
    for _ in range(3):
        delta, opt = slower.update(grads, opt, params)
    assert float(delta["w"][1]) == pytest.approx(-1e-3 / 3, rel=1e-2)
    assert float(updates(steps=1, warmup_steps=10)[0][1]) == 0
    assert float(updates(steps=7, schedule="cosine")[0][1]) == pytest.approx(0, abs=1e-9)
    clipped = autoencoder.optimizer(dataclasses.replace(TINY, weight_decay=0.0, clip_norm=1.0))
    _, opt = clipped.update(grads, clipped.init(params), params)
    moments = [leaf for leaf in jax.tree.leaves(opt) if leaf.shape == (3,)]
    np.testing.assert_allclose(moments[0], [0, 0.06, 0.08], rtol=1e-5)  # (1 - b1) times a gradient of norm 1


def test_damaged_and_foreign_checkpoints(tmp_path, plates, monkeypatch):
    # As the binaries do: reads that go on after the first failed one find their event loop closed.
    monkeypatch.setattr(sys, "unraisablehook", without_closed_loops(sys.unraisablehook))
    now = autoencoder.initial_state(TINY, jax.random.key(0))
    with Checkpoints(tmp_path / "c") as kept:
        kept.save(2, now, {})
    with Checkpoints(tmp_path / "c") as kept:
        other = autoencoder.initial_state(dataclasses.replace(TINY, latent=5), jax.random.key(0))
        with pytest.raises(InputError, match="cannot be read") as error:
            kept.restore(other)
        assert "\n" not in str(error.value)
        del error  # its frames keep the abandoned reads alive beyond this test
    for file in (tmp_path / "c" / "step_2" / "state").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with Checkpoints(tmp_path / "c") as kept, pytest.raises(InputError, match="cannot be read"):
        kept.restore(now)
    gc.collect()
    time.sleep(0.5)


def test_metrics_come_in_order_one_call_late():
    calls, seen = [], []

    def fake(s, data, root):
        calls.append(int(s.step))
        assert len(seen) == max(0, len(calls) - 2)
        return state.TrainState(s.step + 1, {}, {}, {}), {"loss": jnp.array([float(s.step)])}

    start = state.create({}, optax.identity())
    loop.run(fake, start, None, None, steps=5, on_metrics=lambda s, m: seen.append((s, float(m["loss"][0]))))
    assert seen == [(i, float(i)) for i in range(5)]


def test_a_flipped_bit_in_a_checkpoint_is_no_other_number(tmp_path):
    """What zstd cannot compress is stored as it is, and nothing below notices a change."""
    words = np.random.default_rng(0).integers(2**32, size=40_000, dtype=np.uint32)
    start = {"words": jnp.asarray(words)}
    with Checkpoints(tmp_path / "c") as kept:
        kept.save(2, start, {"seconds": 1.5})
    with Checkpoints(tmp_path / "c") as kept:
        assert kept.restore(start)[1] == {"seconds": 1.5}
    largest = max((p for p in (tmp_path / "c").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    changed = bytearray(largest.read_bytes())
    changed[len(changed) // 2] ^= 1
    largest.write_bytes(changed)
    with Checkpoints(tmp_path / "c") as kept, pytest.raises(InputError, match="holds other numbers") as error:
        kept.restore(start)
    assert error.value.status == 1


def test_runs_side_by_side_write_whole_checkpoints(tmp_path):
    """Each its own numbers, also where all write at once."""
    like = {f"{i}": jnp.zeros((50, 50)) for i in range(20)}

    def write(run):
        with parallel.alone(jax.local_devices()[0]), Checkpoints(tmp_path / f"{run}") as kept:
            for s in range(1, 4):
                kept.save(s, {name: np.full((50, 50), 10 * run + s, np.float32) for name in like}, {"run": run})

    with futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    for run in range(4):
        with Checkpoints(tmp_path / f"{run}") as kept:
            assert kept.latest() == 3
            found, record = kept.restore(like)
        assert record == {"run": run}
        same(found, {name: np.full((50, 50), 10 * run + 3, np.float32) for name in like})


def test_steps_of_one_dispatch_divide_every_cadence(monkeypatch):
    assert step.steps_per_call(40, 100) == 1
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert [step.steps_per_call(*c) for c in ((100, 250), (40,), (21,), (7, 3), (8, 12))] == [10, 20, 7, 1, 4]


def test_a_cosine_of_one_step_ends_at_its_end():
    config = dataclasses.replace(TINY, schedule="cosine", warmup_steps=0, learning_rate=0.5)
    assert float(optimizers.schedule(config, 1)(1)) == pytest.approx(0, abs=1e-7)


def test_the_absolute_difference_is_a_map():
    detector = autoencoder.AutoencoderDetector(TINY).only("l2")
    np.testing.assert_allclose(
        detector.compare(jnp.array([[0.2, 0.9]]), jnp.array([[0.5, 0.8]]))["l2"], [[0.3, 0.1]], atol=1e-6
    )


def test_the_setting_that_one_side_lacks_is_named():
    assert configs.difference({"a": 1, "b": 2}, {"b": 2}) == "a (1 here, None there)"
    assert configs.difference({"b": 2}, {"b": 2, "c": 3}) == "c (None here, 3 there)"


def test_a_detector_learns_from_good_images(images):
    detector = autoencoder.AutoencoderDetector(TINY)
    learnt = detector.fit(images)
    untrained = autoencoder.initial_state(TINY, jax.random.key(TINY.seed)).params
    assert jax.tree.structure(learnt) == jax.tree.structure(untrained)
    for before, after in zip(jax.tree.leaves(untrained), jax.tree.leaves(learnt), strict=True):
        assert not np.array_equal(before, after)


class Manager:
    """In orbax' place: counts, and fails on demand."""

    def __init__(self, error=None):
        self.error, self.calls = error, []

    def wait_until_finished(self):
        self.calls.append("wait")
        if self.error:
            raise self.error

    def close(self):
        self.calls.append("close")
        if self.error:
            raise self.error


def test_checkpoints_are_whole_when_their_context_ends(tmp_path):
    kept = Checkpoints(tmp_path / "c")
    kept._manager.close()
    kept._manager = manager = Manager()
    kept.wait()
    assert manager.calls == ["wait"]
    with kept as entered:
        assert entered is kept
    assert manager.calls == ["wait", "wait", "close"]
    manager.calls.clear()
    with pytest.raises(ZeroDivisionError), kept:
        raise ZeroDivisionError
    assert manager.calls == ["close"]
    kept._manager = manager = Manager(OSError(28, "No space left on device"))
    with pytest.raises(
        InputError, match=r"cannot be written \(No space left on device\).*earlier checkpoints are kept"
    ) as error:
        kept.wait()
    assert error.value.status == 1
    assert manager.calls == ["wait"]
    with pytest.raises(InputError, match="No space left"), kept:
        pass
    assert manager.calls == ["wait", "wait", "close"]
