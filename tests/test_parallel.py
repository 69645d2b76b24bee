"""1 against 8 simulated devices, 1 against 2 and 4 processes, and a process that dies."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import parallel_worker as worker
import pytest
from absl import flags

from steel_ad import cli, parallel
from steel_ad import config as configs
from steel_ad.errors import InputError
from steel_ad.studies import autoencoder as study

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


def test_the_stream_of_samples_is_that_of_one_device(found):
    one, many = (read(found[0], n, "batch") for n in ("1", "8"))
    assert 0 < one["batch/label"].mean() < 1
    for name in one:
        np.testing.assert_array_equal(one[name], many[name])


def test_a_process_may_come_late(found):
    assert (found[0] / "late").read_text() == "2.0"


@OTHERS
def test_gradients_are_those_of_one_device(found, others):
    close(read(found[0], "1", "gradient"), read(found[0], others, "gradient"), 1e-5)


@OTHERS
def test_losses_in_float64_stay_together(found, others):
    one, many = (read(found[0], n, "float64")["float64"] for n in ("1", others))
    assert len(one) == 50
    assert one[-5:].mean() < 0.95 * one[:5].mean()
    np.testing.assert_allclose(many, one, rtol=0, atol=1e-8)


def test_batch_norm_is_over_the_global_batch(found):
    many = read(found[0], "8", "norm")
    close(read(found[0], "1", "norm/gradient"), read(found[0], "8", "norm/gradient"), 1e-5)
    x = np.float64(worker.normed())
    assert many["norm/mean"] == pytest.approx(0.1 * x.mean(), rel=1e-5)
    assert many["norm/var"] == pytest.approx(0.9 + 0.1 * x.var(), rel=1e-5)
    assert x.var() > 1.5 * np.mean([image.var() for image in x])  # or each device's own would pass


@OTHERS
def test_images_are_evaluated_in_their_order(found, others):
    np.testing.assert_allclose(read(found[0], others)["means"], 1 + 10 * np.arange(7) / 255, rtol=1e-5)


@OTHERS
def test_metrics_and_thresholds_stay_together(found, others):
    one, many = (read(found[0], n, "metrics") for n in ("1", others))
    assert one.keys() == many.keys()
    assert 0.6 < one["metrics/pixel_auroc"] < 1
    for name, value in one.items():
        np.testing.assert_allclose(many[name], value, rtol=0, atol=1e-3, err_msg=name)


@pytest.mark.parametrize("read_by", ["1", "8", "processes_2", "processes_4"])
def test_parts_that_processes_read_are_one_batch(found, read_by):
    np.testing.assert_array_equal(read(found[0], read_by)["parts"], worker.parts())


def test_a_step_communicates_once(found):
    """All gradients and metrics in one sum; no activation leaves its device."""
    assert json.loads((found[0] / "collectives.json").read_text()) == ["all-reduce"]


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


@pytest.mark.parametrize("count", [2, 4])
def test_processes_checkpoint_is_read_by_one(found, count):
    state = worker.restored(found[0] / f"c_processes_{count}", parallel.mesh())
    saved = read(found[0], f"saved_by_processes_{count}")
    jax.tree.map(np.testing.assert_array_equal, list(saved.values()), jax.tree.leaves(state))


def test_process_0_alone_writes_and_speaks(found):
    folder, said, _ = found
    assert (folder / "written_by_0").exists()
    assert not (folder / "written_by_1").exists()
    assert "said by one" in said[0][0]
    assert "said by one" not in said[1][0]
    assert "means: 7/7 images" in said[0][1]
    assert "images" not in said[1][1]


def test_a_process_that_dies_stops_the_other(found):
    _, said, seconds = found
    assert seconds < 120
    assert f"error: {parallel.LOST}" in said[1][1]


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
