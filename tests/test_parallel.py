"""1 against 8 simulated devices, 1 against 2 and 4 processes, and a process that dies."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import parallel_worker as worker
import pytest
from absl import flags
from jax.sharding import PartitionSpec as P

from steel_ad import cli, parallel
from steel_ad import config as configs
from steel_ad.errors import InputError
from steel_ad.runs import autoencoder as study

ROOT = Path(__file__).parent.parent


def start(mode, folder, *arguments, devices=1):
    """The worker of `mode`, on its way."""
    folder.mkdir(exist_ok=True)
    cache = f"--compilation_cache={os.environ['STEEL_AD_TEST_CACHE']}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-m", "tests.parallel_worker", mode, str(folder), cache, *arguments],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def processes(count, mode, folder):
    """The processes of one run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"--coordinator=127.0.0.1:{free.getsockname()[1]}"
    return [start(mode, folder, address, f"--num_processes={count}", f"--process_id={i}") for i in range(count)]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Folder of what the workers have written, and how the two processes ended: process 0 is stopped in mid-training."""
    folder = tmp_path_factory.mktemp("parallel") / "w"
    many, *two = start("devices", folder, devices=8), *processes(2, "process", folder)
    late = processes(2, "late", folder)
    deadline = time.monotonic() + 500
    while all("." in p.name for p in (folder / "mortal" / "checkpoints").glob("step_*")):
        assert time.monotonic() < deadline
        assert all(p.poll() is None for p in two), [p.communicate() for p in two]
        time.sleep(0.05)
    # As schedulers do; to the other process it is the same as SIGKILL.
    two[0].send_signal(signal.SIGTERM)
    killed = time.monotonic()
    said = [p.communicate(timeout=200) for p in two[::-1]][::-1]
    ended = time.monotonic() - killed
    for worker_ in (many, *late, *processes(4, "process", folder)):
        _, errors = worker_.communicate(timeout=500)
        assert worker_.returncode == 0, errors
    return folder, said, ended


def read(folder, name, prefix=""):
    with np.load(folder / f"{name}.npz") as file:
        return {k: file[k] for k in file.files if k.startswith(prefix)}


def close(a, b, tolerance):
    """Relative to each array's norm."""
    assert a.keys() == b.keys() != set()
    for name in a:
        assert np.linalg.norm(a[name] - b[name]) <= tolerance * np.linalg.norm(a[name]), name


OTHERS = pytest.mark.parametrize("others", ["8", "processes_2", "processes_4"])


@pytest.mark.slow
def test_the_stream_of_samples_is_that_of_one_device(found):
    one, many = (read(found[0], n, "batch") for n in ("1", "8"))
    assert 0 < one["batch/label"].mean() < 1
    for name in one:
        np.testing.assert_array_equal(one[name], many[name])


@pytest.mark.slow
def test_a_process_may_come_late(found):
    assert (found[0] / "late").read_text() == "2.0"


@pytest.mark.slow
@OTHERS
def test_gradients_are_those_of_one_device(found, others):
    close(read(found[0], "1", "gradient"), read(found[0], others, "gradient"), 1e-5)


@pytest.mark.slow
@OTHERS
def test_losses_in_float64_stay_together(found, others):
    one, many = (read(found[0], n, "float64")["float64"] for n in ("1", others))
    assert len(one) == 50
    assert one[-5:].mean() < 0.95 * one[:5].mean()
    np.testing.assert_allclose(many, one, rtol=0, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("others", ["8", "processes_2"])
def test_a_unet_in_float64_learns_and_finds_the_same(found, others):
    """In float32 runs drift apart."""
    one, many = (read(found[0], n, "unet") for n in ("1", others))
    assert len(one["unet/losses"]) == 50
    assert one["unet/losses"][-1] < 0.5 * one["unet/losses"][0]
    np.testing.assert_allclose(many["unet/losses"], one["unet/losses"], rtol=0, atol=1e-8)
    assert 0.8 < one["unet/metrics"][0] < 1  # pixel AUROC
    np.testing.assert_allclose(many["unet/metrics"], one["unet/metrics"], rtol=0, atol=1e-3)


@pytest.mark.slow
def test_batch_norm_is_over_the_global_batch(found):
    many = read(found[0], "8", "norm")
    close(read(found[0], "1", "norm/gradient"), read(found[0], "8", "norm/gradient"), 1e-5)
    x = np.float64(worker.normed())
    assert many["norm/mean"] == pytest.approx(0.1 * x.mean(), rel=1e-5)
    assert many["norm/var"] == pytest.approx(0.9 + 0.1 * x.var(), rel=1e-5)
    assert x.var() > 1.5 * np.mean([image.var() for image in x])  # or each device's own would pass


@pytest.mark.slow
@OTHERS
def test_images_are_evaluated_in_their_order(found, others):
    np.testing.assert_allclose(read(found[0], others)["means"], 1 + 10 * np.arange(7) / 255, rtol=1e-5)


@pytest.mark.slow
@OTHERS
def test_metrics_and_thresholds_stay_together(found, others):
    one, many = (read(found[0], n, "metrics") for n in ("1", others))
    assert one.keys() == many.keys()
    assert 0.6 < one["metrics/pixel_auroc"] < 1
    for name, value in one.items():
        np.testing.assert_allclose(many[name], value, rtol=0, atol=1e-3, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("read_by", ["1", "8", "processes_2", "processes_4"])
def test_parts_that_processes_read_are_one_batch(found, read_by):
    np.testing.assert_array_equal(read(found[0], read_by)["parts"], worker.parts())


@pytest.mark.slow
def test_a_step_communicates_once(found):
    """All gradients and metrics in one sum; no activation leaves its device."""
    assert json.loads((found[0] / "collectives.json").read_text()) == ["all-reduce"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saved", "restored"),
    [
        ("saved_by_8", "restored_on_1"),
        ("saved_by_8", "restored_on_2"),
        ("saved_by_processes_2", "restored_by_processes_2"),
        ("saved_by_processes_4", "restored_by_processes_4"),
    ],
)
def test_a_checkpoint_is_the_same_on_other_devices(found, saved, restored):
    a, b = (read(found[0], name) for name in (saved, restored))
    assert a.keys() == b.keys()
    assert any(np.any(v) for k, v in a.items() if k.startswith("opt_state"))
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_processes_checkpoint_is_read_by_one(found, count):
    state = worker.restored(found[0] / f"c_processes_{count}", parallel.mesh())
    saved = read(found[0], f"saved_by_processes_{count}")
    jax.tree.map(np.testing.assert_array_equal, list(saved.values()), jax.tree.leaves(state))


@pytest.mark.slow
def test_process_0_alone_writes_and_speaks(found):
    folder, said, _ = found
    assert (folder / "written_by_0").exists()
    assert not (folder / "written_by_1").exists()
    assert "said by one" in said[0][0]
    assert "said by one" not in said[1][0]
    assert "means: 7/7 images" in said[0][1]
    assert "images" not in said[1][1]


@pytest.mark.slow
def test_a_process_that_dies_stops_the_other(found):
    _, said, seconds = found
    assert seconds < 120
    assert f"error: {parallel.LOST}" in said[1][1]


@pytest.mark.slow
def test_a_run_whose_process_died_resumes(found):
    state = worker.restored(found[0] / "mortal" / "checkpoints", parallel.mesh())
    end = int(state.step) + 2
    resumed, whole = (worker.train_small(s, end) for s in (state, worker.small_state()))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), resumed, whole)


def test_what_another_process_caused_is_told_from_other_errors(monkeypatch):
    gone = ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer\nmore")
    assert parallel.lost(gone) is None  # there is no other process
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    assert str(parallel.lost(gone)) == f"{parallel.LOST} (UNKNOWN: Gloo AllGather failed: Connection closed by peer)"
    assert parallel.lost(ValueError("No space left on device")) is None


def test_a_batch_that_the_devices_do_not_divide(tmp_path, monkeypatch):
    mesh = jax.sharding.AbstractMesh((8,), ("data",))
    with pytest.raises(InputError, match=r"batch of 12 cannot be divided among 8 devices: .*batch_size=8 or 16 "):
        parallel.check_batch(12, mesh)
    with pytest.raises(InputError, match=r"batch_size=8 \("):
        parallel.check_batch(4, mesh)
    parallel.check_batch(16, mesh)
    monkeypatch.setattr(parallel, "mesh", lambda: mesh)
    for settings in ({"batch_size": 12}, {"batch_size": 16, "crops": "fixed", "num_crops": 12}):
        with pytest.raises(InputError, match="12 cannot be divided"):
            study.run(configs.Autoencoder(**settings), data="nowhere", workdir=tmp_path / "w")
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("127.0.0.1:1", None, None), "--num_processes=N"),
        (("127.0.0.1:1", 2, 2), "in 0..N-1"),
        (("auto", 2, 0), "takes neither"),
        (("", 2, 0), "host:port"),
        (("somewhere", 2, 0), "somewhere"),
        (("127.0.0.1:{port}", 2, 0), "is taken"),
    ],
)
def test_flags_of_several_processes(arguments, said):
    with socket.create_server(("", 0)) as taken, pytest.raises(InputError, match=said):
        parallel.start(arguments[0].format(port=taken.getsockname()[1]), *arguments[1:])


def test_a_run_has_a_process_and_the_first_one_is_0():
    cli.define_processes()
    known = {name: flags.FLAGS[name] for name in ("coordinator", "num_processes", "process_id")}
    for name in known:
        delattr(flags.FLAGS, name)  # of the binaries that ask for it, not of the suite
    assert [flag.value for flag in known.values()] == ["", None, None]
    for name, least in (("num_processes", 1), ("process_id", 0)):
        known[name].parse(str(least))
        assert known[name].value == least
        with pytest.raises(flags.IllegalFlagValueError, match=f"{name}={least - 1}"):
            known[name].parse(str(least - 1))


def test_a_process_joins_the_others_as_it_is_told(monkeypatch):
    joined, met = [], []
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)  # it would be the suite's too
    monkeypatch.setattr(jax.distributed, "initialize", lambda *whom, **how: joined.append((whom, how)))
    monkeypatch.setattr(parallel, "barrier", met.append)
    with socket.create_server(("", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        parallel.start(address, 3, 2)  # only process 0 has to have the port
    parallel.start(address, 3, 0)
    parallel.start("auto", None, None)
    assert [whom for whom, _ in joined] == [(address, 3, 2), (address, 3, 0), (None, None, None)]
    # The two minutes of the sentence about a process that does not come.
    assert {how["initialization_timeout"] for _, how in joined} == {120}
    assert "within two minutes" in parallel.LOST
    assert met == ["start"] * 3

    def nothing(*_, **__):
        raise ValueError("no Slurm here")

    monkeypatch.setattr(jax.distributed, "initialize", nothing)
    with pytest.raises(InputError, match="finds no cluster here"):
        parallel.start("auto", None, None)
    assert len(met) == 3


def test_process_0_is_main_and_only_several_wait_for_each_other(monkeypatch):
    met = []
    monkeypatch.setattr(parallel.multihost_utils, "sync_global_devices", met.append)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert parallel.is_main()  # alone, whatever its number
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    assert not parallel.is_main()
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    assert parallel.is_main()
    for count in (1, 2):
        monkeypatch.setattr(jax, "process_count", lambda count=count: count)
        parallel.barrier(f"of {count}")
    assert met == ["of 2"]


def test_a_thread_is_alone_with_its_device_until_it_is_done(monkeypatch):
    device = jax.devices()[0]
    monkeypatch.setattr(jax, "devices", lambda: ["first", "second", "third"])
    monkeypatch.setattr(jax, "make_mesh", lambda shape, names, *, devices, **_: (shape, names, devices))
    assert (parallel.is_alone(), parallel.first_device()) == (False, "first")

    def fails():
        with parallel.alone(device), ThreadPoolExecutor(1) as pool:
            assert (parallel.is_alone(), parallel.first_device()) == (True, device)
            assert parallel.mesh() == ((1,), ("data",), [device])
            assert not pool.submit(parallel.is_alone).result()
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert not parallel.is_alone()
    assert parallel.mesh() == ((3,), ("data",), ["first", "second", "third"])
    assert parallel.mesh(2) == ((2,), ("data",), ["first", "second"])


def test_what_devices_hold_of_arrays():
    mesh, values = parallel.mesh(1), {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.int32(4)}
    places = [parallel.replicated(mesh), parallel.spread(mesh), parallel.spread_batches(mesh)]
    assert [place.spec for place in places] == [P(), P("data"), P(None, "data")]
    kept = parallel.put(values, places[0])
    assert all(leaf.sharding == places[0] for leaf in jax.tree.leaves(kept))
    own = parallel.local({**kept, "name": "n"})
    assert own.pop("name") == "n"
    for found in (kept, own):
        jax.tree.map(np.testing.assert_array_equal, found, values)
    batches = parallel.spread_parts(values["a"], mesh)
    assert batches.sharding.is_equivalent_to(places[2], 2)
    np.testing.assert_array_equal(batches, values["a"])


def test_arrays_of_several_processes_are_put_part_by_part(monkeypatch):
    """An array that is spread over them already goes from device to device."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "device_put", lambda *_: pytest.fail("another process's devices cannot be reached"))
    sharding = parallel.spread(parallel.mesh(1))
    for value in (np.arange(3), jax.numpy.arange(3)):
        found = parallel.put({"x": value}, sharding)["x"]
        assert found.sharding == sharding
        np.testing.assert_array_equal(found, [0, 1, 2])


@pytest.mark.parametrize(
    ("devices", "whole"),
    [
        ([slice(2, 4), slice(4, 6)], slice(2, 6)),
        ([slice(6, None), slice(4, 6)], slice(4, 8)),
        ([slice(None, 2)], slice(0, 2)),
        ([slice(None)], slice(0, 8)),
    ],
)
def test_a_processs_part_of_a_batch_is_that_of_its_devices(monkeypatch, devices, whole):
    parts = {**{i: (part,) for i, part in enumerate(devices)}, "of another process": None}
    spread = SimpleNamespace(addressable_devices_indices_map=lambda shape: {(8,): parts}[shape])
    monkeypatch.setattr(parallel, "spread", lambda mesh: spread)
    assert parallel.part(8, None) == whole


@pytest.mark.parametrize(("devices", "constraints"), [(None, 0), (1, 0), (8, 1)])
def test_a_batch_is_split_where_there_are_devices_for_it(devices, constraints):
    def traced():
        return str(jax.make_jaxpr(parallel.split_batch)(jax.ShapeDtypeStruct((16, 3), np.float32)))

    if devices is None:
        text = traced()
    else:
        mesh = jax.sharding.AbstractMesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        with parallel.inside(SimpleNamespace(abstract_mesh=mesh)):
            text = traced()
    assert text.count("sharding_constraint[") == constraints
    assert ("'data'" in text) == bool(constraints)
    np.testing.assert_array_equal(parallel.split_batch(np.arange(4)), [0, 1, 2, 3])
