import contextlib
import functools
import itertools
import json
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import optax
import pytest
from matplotlib.text import Text

from steel_ad import benchmark, cli, metrics, native
from steel_ad import config as configs
from steel_ad.benchmark import ceilings, cold_start, data, inspection, peers, ssim, timing, train, unet
from steel_ad.benchmark import metrics as metrics_works
from steel_ad.benchmark.peers import arrays
from steel_ad.data import datasets, folders
from steel_ad.data.images import Images
from steel_ad.data.patches import stack
from steel_ad.detectors import autoencoder, segmentation
from steel_ad.errors import InputError
from steel_ad.ops import forms, sliding
from steel_ad.report import roofline, style
from steel_ad.train.state import create
from steel_ad.train.step import make_step

OLD = {
    "device": "an older machine",
    "rows": [
        {"work": "ssim_forward_2x32", "impl": "steel_ad", "median_ms": 0.5},
        {"work": "ssim_forward_2x32", "impl": "forgotten", "median_ms": 2.0},
    ],
}


def start(*flags):
    command = [sys.executable, "-m", "experiments.benchmark", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    (folder / "old.json").write_text(json.dumps(OLD))
    # Starting processes takes longest, and has a test of its own.
    only = ",".join(name for name in benchmark.GROUPS if name != "cold_start")
    done = start("--tiny", "--repeats=3", f"--only={only}", f"--out={folder}/new.json", f"--compare={folder}/old.json")
    assert done.returncode == 0, done.stderr
    return folder, json.loads((folder / "new.json").read_text()), done.stdout


@pytest.mark.slow
def test_the_binary_writes_every_work_and_implementation(tiny):
    _, result, _ = tiny
    assert set(result) == {
        *(
            "device",
            "machine",
            "load",
            "versions",
            "native",
            "precision",
            "flags",
            "ceilings",
            "ceilings_in_turn",
            "rows",
        )
    }
    assert result["machine"]["cpus"] >= 1
    assert set(result["native"]) == {"convolutions", "ssim"}
    first, last = result["ceilings_in_turn"]
    assert result["ceilings"] == {name: max(first[name], last[name]) for name in first}
    assert result["flags"]["tiny"] is True
    assert result["flags"]["only"] == [name for name in benchmark.GROUPS if name != "cold_start"]
    assert "jax" in result["versions"]
    assert result["ceilings"]["matmul_tflops"] > 0
    assert result["ceilings"]["copy_gbs"] > 0
    done = {(row["work"], row["impl"]) for row in result["rows"]}
    works = ("ssim_forward_2x32", "ssim_gradient_2x32")
    assert done >= set(itertools.product(works, ("steel_ad", "steel_ad_gaussian", "dm_pix")))
    assert done >= {("train_ssim_b4", "steel_ad"), ("train_ssim_b4", "linen_naive")}
    assert done >= {
        ("inspection_48", "steel_ad"),
        ("inspection_tiles_48x64", "steel_ad"),
        ("unet2_train_b2", "steel_ad"),
    }
    assert done >= set(itertools.product(["sweep_2_seeds_b2"], ("steel_ad", "steel_ad_vmapped")))
    assert done >= {("metrics_4x32", "steel_ad"), ("metrics_4x32", "sklearn_numpy")}
    assert done >= set(itertools.product(["crops_32", "insert_64"], ("steel_ad", "numpy")))
    assert done >= {("read_png_64", "steel_ad"), ("read_png_64", "cv2"), ("render_64", "steel_ad")}
    assert done >= set(itertools.product(["train_from_files_b4"], ("steel_ad", "steel_ad_in_memory")))
    assert len(done) == len(result["rows"])


@pytest.mark.slow
def test_a_row_has_its_times_in_order_and_what_they_are_measured_by(tiny):
    timed = {row["impl"] for row in tiny[1]["rows"]}
    for row in tiny[1]["rows"]:
        assert 0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"]
        assert row["repeats"] == 3
        assert row["first_ms"] > 0
        assert row["bytes"] > 0
        assert row["roof_share"] > 0
        if row["work"].startswith(("ssim", "train", "inspection", "unet", "sweep")):
            assert row["flops"] > 0
            if not row["work"].startswith("inspection_tiles") and row["impl"] in (
                "steel_ad",
                "steel_ad_xla",
                "linen_naive",
            ):
                assert row["compile_s"] > 0
                # XLA counts what it does itself.
                if row["impl"] != "steel_ad" or "steel_ad_xla" not in timed:
                    assert (row["flops_counted"] or 0) > 0, row
        if row["impl"] == "steel_ad":
            assert row["ratio"] == 1


@pytest.mark.slow
def test_a_row_says_how_much_is_done_in_a_second(tiny):
    rows = {row["work"]: row for row in tiny[1]["rows"] if row["impl"] == "steel_ad"}
    for work, name, amount in [
        ("inspection_48", "mpx_s", 2 * 48 * 48 / 1e6),
        ("read_png_64", "mpx_s", 2 * 64 * 64 / 1e6),
        ("crops_32", "patches_s", 4),
        ("insert_64", "images_s", 2),
    ]:
        assert rows[work][name] == pytest.approx(amount / (rows[work]["median_ms"] / 1e3))
    assert "mpx_s" not in rows["crops_32"]


@pytest.mark.slow
def test_the_picture_lies_beside_the_numbers_and_nothing_else_does(tiny):
    folder = tiny[0]
    assert {p.name for p in folder.iterdir()} == {"old.json", "new.json", "new.png"}
    assert matplotlib.image.imread(folder / "new.png").shape[1] > 900


@pytest.mark.slow
def test_compare_prints_what_has_changed(tiny):
    _, result, printed = tiny
    table = printed.split("an older machine")[1]
    new = next(r["median_ms"] for r in result["rows"] if (r["work"], r["impl"]) == ("ssim_forward_2x32", "steel_ad"))
    rows = {(r["work"], r["impl"]): r for r in benchmark.comparison(OLD, result)}
    assert rows["ssim_forward_2x32", "steel_ad"]["new/old"] == pytest.approx(new / 0.5)
    assert rows["ssim_forward_2x32", "forgotten"]["new_ms"] is None
    assert rows["train_ssim_b4", "steel_ad"]["old_ms"] is None
    assert len(rows) == len(result["rows"]) + 1
    lines = [line.split() for line in table.splitlines()]
    assert ["ssim_forward_2x32", "forgotten", "2.000", "-", "-", "-", "-"] in lines
    assert "Another versions: python none and now " in printed
    assert "Another device: an older machine and now " in printed


def test_all_groups_are_measured_where_none_is_named(tmp_path, monkeypatch):
    cold_start._import()  # once with what it is about, which takes longer
    monkeypatch.setattr(cold_start, "_IMPORTS", "import sys")
    groups = {"metrics": metrics_works.works, "cold_start": cold_start.works}
    monkeypatch.setattr(benchmark, "GROUPS", groups)
    result = benchmark.run(only=[], out=tmp_path / "a.json", repeats=3, budget_s=1.0, tiny=True, compare=None)
    rows = {(row["work"], row["impl"]): row for row in result["rows"]}
    assert set(rows) == {
        *(("metrics_4x32", "steel_ad"), ("metrics_4x32", "sklearn_numpy"), ("cold_start", "steel_ad_import_only"))
    }
    row = rows["cold_start", "steel_ad_import_only"]
    assert 0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"]
    assert (row["repeats"], row["roof_share"]) == (3, None)
    assert row["first_ms"] > 0
    monkeypatch.setattr(cold_start, "_IMPORTS", "import no_such_package")
    with pytest.raises(timing.Unavailable, match="no_such_package"):
        cold_start._import()


def test_an_unknown_group_ends_with_one_sentence_and_status_2():
    done = start("--only=ssim,sime")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(
        "error: there is no group or work 'sime': --only takes some of ssim, ssim_forward_32x128, ssim_gradient_32x128, "
    )
    assert len(done.stderr.splitlines()) == 1
    for name in (
        "train_l2_b128",
        "inspection_2048x4096",
        "metrics_200x256",
        "insert_256",
        "unet16_train_b8",
        "cold_start",
    ):
        assert name in done.stderr


def test_help_lists_the_flags_of_every_binary_too():
    said = start("--help").stdout
    assert all(f"\n  --{name}" in said for name in ("only", "compilation_cache", "[no]native"))


def test_ctrl_c_says_what_is_left_of_a_run(monkeypatch, capsys):
    def stopped():
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    for name in ("keep_freed_memory", "use_compilation_cache"):
        monkeypatch.setattr(cli, name, lambda *_: None)
    monkeypatch.setattr(cli, "_as_one_of_several", contextlib.nullcontext)
    for name in ("_CACHE", "_NATIVE"):
        monkeypatch.setattr(cli, name, types.SimpleNamespace(value=""))
    with pytest.raises(SystemExit) as ended:
        cli._guarded(stopped, "nothing")
    assert ended.value.code == 130
    assert capsys.readouterr().err == "error: interrupted: nothing\n"


def test_only_the_named_implementations_are_timed(tmp_path):
    """Of works that have none of them there is no row."""
    named = {"only": ["ssim_forward_2x32", "crops_32", "render_64"], "impl": ["numpy", "steel_ad_gaussian"]}
    result = benchmark.run(**named, out=tmp_path / "a.json", repeats=3, budget_s=1.0, tiny=True, compare=None)
    assert [(row["work"], row["impl"]) for row in result["rows"]] == [
        ("ssim_forward_2x32", "steel_ad_gaussian"),
        ("crops_32", "numpy"),
    ]
    assert result["flags"]["impl"] == named["impl"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"impl": ["dm_pix", "torsch"]}, "no implementation 'torsch' here: --impl takes some of steel_ad, "),
        ({"only": ["ssim"], "impl": ["linen_naive"]}, "no implementation 'linen_naive' here"),
        ({"out": "x.png"}, "must end in .json"),
        ({"repeats": 2}, "at least 3"),
        ({"budget_s": 0.0}, "positive"),
        ({"compare": "none.json"}, "no earlier run"),
        ({"compare": "list.json"}, "no benchmark's JSON"),
        ({"compare": "row.json"}, "no benchmark's JSON"),
        ({"compare": "torn.json"}, "no benchmark's JSON"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_timed(tmp_path, change, message):
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "row.json").write_text('{"device": "a", "rows": [{"work": "ssim"}]}')
    (tmp_path / "torn.json").write_text('{"device": "a", "ro')
    options = {"only": [], "out": "x.json", "repeats": 3, "budget_s": 1.0, "tiny": True, "compare": None} | change
    for name in ("out", "compare"):
        options[name] = options[name] and tmp_path / options[name]
    with pytest.raises(InputError, match=message):
        benchmark.run(**options)
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize("loss", ["ssim", "l2"])
def test_flops_of_a_training_step_are_what_xla_counts_in_the_plain_form(monkeypatch, loss):
    # The rewritten form pays for the zeros of its kernels; XLA leaves out the taps beyond the border.
    for operation in ("halve", "double"):
        monkeypatch.setitem(forms.FORMS, operation, forms.FORMS[operation][-1:])
    config = configs.Autoencoder(crops="fresh", batch_size=4, loss=loss)
    state = jax.eval_shape(lambda: autoencoder.initial_state(config, jax.random.key(0)))
    plates = jax.tree.map(jnp.asarray, stack([np.zeros((256, 256), np.uint8)] * 2))
    step = make_step(autoencoder.objective(config), autoencoder.optimizer(config))
    counted = step.lower(state, autoencoder.Good(plates), jax.random.key(0)).cost_analysis()["flops"]
    assert train.cost(config)[0] == pytest.approx(counted, rel=0.1)


def test_bytes_of_a_training_step_are_parameters_moments_activations_and_patches():
    config = configs.Autoencoder(batch_size=2)
    activations = 64**2 * 32 + 2 * 32**2 * 32 + 2 * 16**2 * 64 + 8**2 * (128 + 64 + 32) + 100
    activations += 8**2 * (32 + 64 + 128) + 2 * 16**2 * 64 + 2 * 32**2 * 32 + 64**2 * 32 + 128**2
    assert train.cost(config)[1] == 24 * 1_048_549 + 2 * (8 * activations + 128**2)


@pytest.mark.parametrize(("gradient", "tolerance"), [(False, 0.15), (True, 0.5)])
def test_flops_of_ssim_are_near_what_xla_counts(gradient, tolerance):
    x = jnp.zeros((1, 256, 256))
    maps = jax.vmap(ssim.ssim_map)
    function = jax.grad(lambda x, y: maps(x, y).mean()) if gradient else maps
    counted = jax.jit(function).lower(x, x).cost_analysis()["flops"]
    # Constants are computed in the unoptimised program too, and fused code computes some values twice.
    assert ssim.flops(x.size, gradient=gradient) == pytest.approx(counted, rel=tolerance)


def test_flops_of_an_inspection_are_what_xla_counts_in_the_plain_form(monkeypatch):
    for operation in ("halve", "double"):
        monkeypatch.setitem(forms.FORMS, operation, forms.FORMS[operation][-1:])
    monkeypatch.setattr(sliding, "_shares", lambda *_: False)  # the count is of each window by itself
    config = configs.Autoencoder(stride=64)
    params = jax.eval_shape(lambda: autoencoder.initial_state(config, jax.random.key(0)).params)
    images = jax.ShapeDtypeStruct((1, 256, 256), np.uint8)
    counted = inspection.program(config).lower(params, images).cost_analysis()["flops"]
    flops, moved = inspection.cost(config, (1, 256, 256))
    assert flops == pytest.approx(counted, rel=0.1)
    # 121 million multiply-adds a window of 128 (SPEC section 4).
    assert inspection.network_flops(config) == pytest.approx(2 * 121e6, rel=0.01)
    assert moved == 256**2 * (1 + 2 * 4) + 4 * 1_048_549


def test_flops_of_a_step_of_the_unet_are_near_what_xla_counts():
    config = configs.Segmentation(width=4, batch_size=2, patch_size=64, loss="bce", optimizer="adam", steps=10)
    plates = jax.tree.map(jnp.asarray, stack([np.zeros((64, 64), np.uint8)] * 2))
    state = jax.eval_shape(lambda: segmentation.initial_segmentation(config, 10))
    step = make_step(segmentation.segmentation_objective(config), segmentation.optimizer(config, 10))
    counted = step.lower(state, segmentation.Samples(plates), jax.random.key(0)).cost_analysis()["flops"]
    assert unet.cost(config)[0] == pytest.approx(counted, rel=0.15)


def test_the_peer_of_the_metrics_finds_the_same_areas():
    maps = functools.partial(metrics_works.maps, 4, 32)
    made = metrics_works.works(tiny=True)[0].makers
    ours, theirs = made["steel_ad"]().call(), made["sklearn_numpy"]().call()
    assert theirs == pytest.approx(ours, abs=1e-9)
    scores, masks = maps()
    # With ties, over the image's whole range of FPR.
    coarse = np.round(scores)
    assert arrays.numpy_aupro(coarse, masks, 1.0) == pytest.approx(
        metrics.aupro(metrics.rank(coarse, masks), 1.0), abs=1e-9
    )


def test_peers_insert_and_cut_what_ours_do():
    """The same pixels with the same statistics: nothing is left out of the peers' works."""
    images = functools.partial(data._plates, 2, 64)
    patches = arrays.numpy_crops(images, 64, 32).call()
    assert (patches.shape, patches.dtype, patches.min() >= 0, patches.max() <= 1) == (
        (64, 32, 32, 1),
        np.float32,
        True,
        True,
    )
    difference = np.full((1, 16, 16), 0.25, np.float32)
    mask = np.zeros((1, 16, 16), bool)
    mask[0, 4:9, 6:13] = True
    black = np.zeros((50, 20, 20), np.uint8)
    plates, marked = arrays.numpy_insert(lambda: black, lambda: (difference, mask)).call()
    # Each mask is wholly on its plate, and the difference is added below it.
    assert set(marked.sum((1, 2))) == {35}
    assert (plates[marked] == 0.25).all()
    assert len({m.tobytes() for m in marked}) > 20


def test_latency_is_of_calls_that_are_waited_for(monkeypatch):
    now = 0.0

    def wait(seconds):
        nonlocal now
        now += seconds

    times = iter([50, 40, *range(1, 100), 1000])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    program = timing.with_latency(timing.Program(call=lambda: next(times), wait=wait))
    for _ in range(101):
        program.call()
    few = {"p50_ms": pytest.approx(50e3), "max_call_ms": pytest.approx(99e3), "calls": 99}
    assert program.extras() == few  # too few for a percentile
    program.call()
    most = {"p50_ms": pytest.approx(50.5e3), "max_call_ms": pytest.approx(1000e3), "calls": 100}
    assert program.extras() == {**most, "p99_ms": pytest.approx(108.01e3)}


def test_a_cold_start_ends_with_the_first_step(tmp_path):
    script = "import sys, tempfile, time; tempfile.mkdtemp(); print('train: 1/1 steps', file=sys.stderr, flush=True); time.sleep(60)"
    cold_start.first_step((sys.executable, "-c", script), {"TMPDIR": str(tmp_path)})
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(timing.Unavailable, match="no step"):
        cold_start.first_step((sys.executable, "-c", "import sys; sys.exit('no step')"))


# Least bytes of the full works, 20 of those whose costs are set.
SIZES = {
    "ssim_forward_32x128": 3 * 4 * 32 * 128**2,
    "ssim_gradient_32x128": 3 * 4 * 32 * 128**2,
    "ssim_forward_8x2048": 3 * 4 * 8 * 2048**2,
    "ssim_gradient_8x2048": 3 * 4 * 8 * 2048**2,
    "metrics_200x256": 5 * 200 * 256**2,
    "read_png_1024": 16 * 1024**2,
    "crops_128": 5 * 512 * 128**2,
    "insert_256": 9 * 64 * 256**2,
    "render_256": 4 * 16 * 256**2,
    "train_from_files_b16": 20.0,
    **dict.fromkeys(("train_ssim_b32", "train_ssim_b128", "train_l2_b32", "train_l2_b128"), 20.0),
    **dict.fromkeys(("inspection_256", "inspection_1x256", "inspection_2048x4096", "unet16_train_b8"), 20.0),
    "inspection_tiles_512x1024": 20.0,
    # As much for each of four seeds.
    "sweep_4_seeds_b16": 80.0,
    "cold_start": None,
}
AMOUNTS = {
    "inspection_256": {"mpx_s": 8 * 0.065536},
    "inspection_1x256": {"mpx_s": 0.065536},
    "inspection_2048x4096": {"mpx_s": 8.388608},
    "inspection_tiles_512x1024": {"mpx_s": 0.524288},
    "read_png_1024": {"mpx_s": 16.777216},
    "crops_128": {"patches_s": 512},
    "insert_256": {"images_s": 64},
    "render_256": {"images_s": 16},
    "train_from_files_b16": {"patches_s": 16},
}


@pytest.fixture
def works(monkeypatch):
    """Full-size works by name, of which none is begun: no code of this machine's own, no PyTorch, and costs that take no tracing."""
    monkeypatch.setattr(native, "ready", lambda: False)
    monkeypatch.setattr(native, "cuda_ready", lambda window: False)
    monkeypatch.setattr(peers, "torch_installed", lambda: False)
    for module in (train, inspection, unet):
        monkeypatch.setattr(module, "cost", lambda *_: (10.0, 20.0))
    return lambda: {work.name: work for make in benchmark.GROUPS.values() for work in make(tiny=False)}


def test_full_works_are_of_the_sizes_that_they_are_named_by(works):
    found = works()
    assert {name: work.bytes for name, work in found.items()} == SIZES
    for name, work in found.items():
        assert dict(work.amounts) == pytest.approx(AMOUNTS.get(name, {})), name
        if SIZES[name] in (20.0, 80.0):
            assert work.flops == SIZES[name] / 2
        else:
            assert (work.flops is None) != name.startswith("ssim")
    assert found["ssim_forward_32x128"].flops == 32 * 128**2 * (80 + 35)
    assert found["ssim_gradient_32x128"].flops == 32 * 128**2 * (160 + 80)
    # Long enough for a percentile of single images, and for what was read ahead not to matter.
    longer = {name: work.block_s for name, work in found.items() if work.block_s != 0.05}
    assert longer == {"inspection_1x256": 1, "inspection_2048x4096": 1, "train_from_files_b16": 5}


def test_implementations_are_those_that_the_machine_has(works, monkeypatch):
    found = {name: set(work.makers) for name, work in works().items()}
    assert found["ssim_forward_32x128"] == {"steel_ad", "steel_ad_gaussian", "dm_pix", "scikit_image", "cv2_box"}
    assert found["ssim_gradient_32x128"] == {"steel_ad", "steel_ad_gaussian", "dm_pix"}
    assert found["train_l2_b32"] == {"steel_ad", "linen_naive"}
    assert found["inspection_256"] == found["unet16_train_b8"] == {"steel_ad"}
    cold_starts = {"steel_ad", "steel_ad_from_files", "steel_ad_without_cache", "steel_ad_import_only"}
    assert found["cold_start"] == cold_starts
    monkeypatch.setattr(peers, "torch_installed", lambda: True)
    monkeypatch.setattr(native, "ready", lambda: True)
    more = {name: set(work.makers) - found[name] for name, work in works().items()}
    how = {f"torch_{way}_{layout}" for way in ("eager", "compile") for layout in ("nchw", "channels_last")}
    assert more["train_l2_b32"] == more["unet16_train_b8"] == how | {"steel_ad_xla"}
    assert more["inspection_256"] == {"torch_opencv_nchw", "torch_opencv_channels_last", "steel_ad_xla"}
    by_torch = {
        "torch_avg_pool",
        "torch_avg_pool_separable",
        "torch_avg_pool_compiled",
        "torch_banded",
        "torch_banded_compiled",
    }
    assert more["ssim_gradient_32x128"] == by_torch | {"torchmetrics", "pytorch_msssim", "steel_ad_xla"}
    # A GPU has both precisions, programs recorded as graphs, larger batches and frames under way side by side.
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    on_gpu = works()
    graphs = {name.replace("eager", "graphs") for name in how if "eager" in name}
    both = {name + end for name in how | graphs for end in ("", "_bf16")} | {"steel_ad_xla", "steel_ad_bf16"}
    assert set(on_gpu["train_l2_b32"].makers) == both | {"steel_ad", "linen_naive"}
    assert set(on_gpu["unet16_train_b8"].makers) == both | {"steel_ad"}
    assert on_gpu["inspection_256"].amounts == {"mpx_s": 128 * 0.065536}
    assert on_gpu["inspection_8x2048x4096"].amounts == {"mpx_s": 8 * 8.388608}
    assert set(on_gpu["inspection_tiles_2048x4096"].makers) == {"steel_ad", "steel_ad_bf16"}
    assert on_gpu["train_from_files_b16"].block_s == 30


@pytest.mark.parametrize("place", [None, "somewhere"])
def test_pytorch_is_looked_for_without_an_import(monkeypatch, place):
    monkeypatch.setattr(peers.importlib.util, "find_spec", {"torch": place}.get)
    assert peers.torch_installed() is (place is not None)


def test_a_compiled_program_comes_with_its_seconds_and_what_xla_counts(monkeypatch):
    clock = iter([10.0, 12.5] * 2)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    a, b = jnp.ones((8, 16)), jnp.ones((16, 32))
    program, seconds, counted = timing.compiled(jax.jit(jnp.matmul), a, b)
    np.testing.assert_array_equal(program(a, b), np.full((8, 32), 16))
    assert (seconds, counted["flops"]) == (2.5, 2 * 8 * 16 * 32)

    def steel_ad_product(a, b):
        return a @ b

    # What calls of that name do, code of this machine's own, is not seen by XLA.
    assert timing.compiled(jax.jit(steel_ad_product), a, b)[2] == {}


@pytest.mark.parametrize(
    ("on_cpu", "on_gpu", "window", "names"),
    [
        (False, False, 11, ["steel_ad"]),
        (True, False, None, ["steel_ad", "steel_ad_xla"]),
        (False, True, 11, ["steel_ad", "steel_ad_xla"]),
        (False, True, 7, ["steel_ad"]),
        (False, True, None, ["steel_ad"]),
    ],
)
def test_what_has_code_of_its_own_is_also_done_without(monkeypatch, on_cpu, on_gpu, window, names):
    monkeypatch.setattr(native, "ready", lambda: on_cpu)
    monkeypatch.setattr(native, "cuda_ready", lambda size: on_gpu and size == 11)

    def maker():
        return native._suspended

    makers = timing.with_xla_alone({"steel_ad": maker}, maker, window)
    assert list(makers) == names
    assert [make() for make in makers.values()] == [False, True][: len(names)]


def test_ceilings_are_of_the_fastest_repeat(monkeypatch):
    """The first call of each is not timed; on CPU there is a second library, and no half precision."""
    timed = []

    def seconds(program):
        timed.append(program)
        return 9.0 if timed.count(program) == 1 else 8.0 - timed.count(program)

    monkeypatch.setattr(ceilings, "seconds", seconds)
    monkeypatch.setattr(ceilings, "cpu_compiler_options", lambda: None)
    found = ceilings.ceilings(repeats=3, tiny=True)
    # The fourth call, in 4 s: two FLOPs an element and term, 4 bytes read and written.
    assert found == pytest.approx({"matmul_tflops": 2 * 256**3 / 4 / 1e12, "copy_gbs": 2 * 4 * 2**20 / 4 / 1e9})
    assert len(timed) == 8
    monkeypatch.setattr(ceilings, "_product", lambda dtype, side, repeats: side * jnp.dtype(dtype).itemsize)
    monkeypatch.setattr(ceilings, "_pass", lambda count, repeats: count)
    assert ceilings.ceilings(repeats=3, tiny=False) == {"matmul_tflops": 4 * 2048, "copy_gbs": 2**26}
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    on_gpu = ceilings.ceilings(repeats=3, tiny=False)
    assert on_gpu == {"matmul_tflops": 4 * 8192, "matmul_bf16_tflops": 2 * 8192, "copy_gbs": 2**29}


def test_what_one_run_lacks_is_compared_with_nothing():
    rows = [("fresh", None), ("steel_ad", 1.0)]
    new = {"rows": [{"work": "ssim_forward_2x32", "impl": i, "median_ms": 2.0, "ratio": ratio} for i, ratio in rows]}
    assert [tuple(row.values()) for row in benchmark.comparison(OLD, new)] == [
        ("ssim_forward_2x32", "fresh", None, 2.0, None, None, None),
        ("ssim_forward_2x32", "steel_ad", 0.5, 2.0, 4.0, None, 1.0),
        ("ssim_forward_2x32", "forgotten", 2.0, None, None, None, None),
    ]


def test_what_differs_between_two_runs_is_named():
    was, now = {"torch": "2.1", "jax": "0.10"}, {"torch": "2.2", "jax": "0.10", "numpy": "2"}
    assert benchmark._difference(was, now) == "torch 2.1 and now 2.2, numpy none and now 2"
    assert benchmark._difference(0.125, None) == "0.125 and now none"


def test_read_images_are_those_that_were_written(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 20, 24), np.uint8)
    paths = data.write_pngs(tmp_path, images)
    assert [path.name for path in paths] == ["000.png", "001.png", "002.png"]
    for program in (data._read(lambda: images), arrays.cv2_read(lambda: images)):
        np.testing.assert_array_equal(np.stack(program.call()), images)
        program.close()
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("per_call", [1, 3])
def test_a_program_of_steps_goes_on_from_call_to_call(monkeypatch, per_call):
    monkeypatch.setattr(train, "steps_per_call", lambda *cadences: {(12, 6): per_call}[cadences])

    def objective(params, extra, data, step, root):
        return params["w"] * data[0], (extra, {})

    config = configs.Autoencoder(steps=12, checkpoint_every=6)
    state = create({"w": jnp.float32(8)}, optax.sgd(0.5))
    program = train.stepping(objective, optax.sgd(0.5), state, [np.float32(2)], config)
    assert (program.works, program.precision) == (per_call, "float32")
    assert program.compile_s > 0
    calls = [program.call() for _ in range(6 // per_call)]
    # A step takes half of the slope off the weight.
    np.testing.assert_array_equal(np.concatenate([found["loss"] for found in calls]), [16, 14, 12, 10, 8, 6])
    np.testing.assert_array_equal(np.concatenate([found["gradient_norm"] for found in calls]), [2] * 6)


def recorder(calls, name):
    return timing.Program(call=lambda: calls.append(name), wait=lambda _: None)


def test_implementations_take_turns():
    calls = []
    first, blocks = timing.blocks({n: recorder(calls, n) for n in "ABC"}, repeats=4, budget_s=1e9, block_s=0.0)
    # The first call and four rounds, each block after a call that is not timed.
    assert "".join(calls) == "ABC" + "AABBCC" * 4
    assert set(first) == set("ABC")
    assert {len(times) for times in blocks.values()} == {4}


def test_a_slow_implementation_gets_three_blocks_and_the_others_all(monkeypatch):
    now = 0.0

    def take(seconds):
        def call():
            nonlocal now
            now += seconds

        return timing.Program(call=call, wait=lambda _: None, works=2)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: None)
    makers = {"steel_ad": lambda: take(1.0), "slow": lambda: take(20.0), "quick": lambda: take(0.01)}
    work = timing.Work("work", 1e9, 1e9, makers)
    rows, left_out = timing.measure(work, ours="steel_ad", repeats=10, budget_s=30.0, block_s=0.1)
    assert [row["repeats"] for row in rows] == [10, 3, 10]
    assert [row["median_ms"] for row in rows] == pytest.approx([500, 10_000, 5])
    assert [row["first_ms"] for row in rows] == pytest.approx([1000, 20_000, 10])
    assert [row["ratio"] for row in rows] == pytest.approx([1, 20, 0.01])
    assert left_out == {}


def test_what_cannot_run_here_is_left_out_with_its_reason():
    def without():
        raise timing.Unavailable("no\ncompiler")

    def missing():
        import no_such_package  # noqa: F401

    work = timing.Work("work", 1, 1, {"steel_ad": lambda: recorder([], ""), "a": without, "b": missing})
    rows, left_out = timing.measure(work, ours="steel_ad", repeats=3, budget_s=1.0, block_s=0.0)
    assert [row["impl"] for row in rows] == ["steel_ad"]
    assert left_out == {"a": "no compiler", "b": "No module named 'no_such_package'"}


@pytest.mark.parametrize(("ours", "ratios"), [(("", "_bf16"), [1, 0.5, 4, 8]), (("_bf16",), [1, 4, 8])])
def test_what_others_do_in_bfloat16_is_relative_to_ours_in_bfloat16(monkeypatch, ours, ratios):
    now = 0.0

    def maker(seconds, precision):
        def call():
            nonlocal now
            now += seconds

        return lambda: timing.Program(call=call, wait=lambda _: None, precision=precision)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: None)
    times = {"": (2.0, "float32"), "_bf16": (1.0, "bfloat16")}
    makers = {f"steel_ad{form}": maker(*times[form]) for form in ours}
    makers |= {"a_bf16": maker(4.0, "bfloat16"), "b_bf16": maker(8.0, "bfloat16")}
    rows, _ = timing.measure(timing.Work("work", 1, 1, makers), ours="steel_ad", repeats=3, budget_s=1e9)
    assert [row["ratio"] for row in rows] == ratios


@pytest.mark.parametrize("when", ["made", "called first", "called later"])
def test_what_fails_is_left_out_and_the_others_are_timed(when):
    """As a peer does that the memory is too small for."""
    calls, closed = [], []

    def fails():
        calls.append("slow")
        if len(calls) == {"made": 1, "called first": 2, "called later": 6}[when]:
            raise RuntimeError("no memory:\n" + 1000 * "x")
        return timing.Program(call=fails, wait=lambda _: None, close=lambda: closed.append(True))

    work = timing.Work("work", 1, 1, {"slow": fails, "steel_ad": lambda: recorder([], "")})
    rows, left_out = timing.measure(work, ours="steel_ad", repeats=4, budget_s=1.0, block_s=0.0)
    assert [(row["impl"], row["repeats"]) for row in rows] == [("steel_ad", 4)]
    assert left_out["slow"].startswith("RuntimeError: no memory: xxx")
    assert len(left_out["slow"]) < 350
    assert closed == ([] if when == "made" else [True])


def test_that_ours_failed_is_said_when_all_is_written(tmp_path, monkeypatch):
    def broken():
        raise RuntimeError("broken")

    makers = {"steel_ad": broken, "peer": lambda: recorder([], "")}
    monkeypatch.setattr(benchmark, "GROUPS", {"some": lambda *, tiny: [timing.Work("one", None, None, makers)]})
    with pytest.raises(InputError, match="steel_ad failed in one ") as raised:
        benchmark.run(only=[], out=tmp_path / "a.json", repeats=3, budget_s=1.0, tiny=True, compare=None)
    assert raised.value.status == 1
    assert [row["impl"] for row in json.loads((tmp_path / "a.json").read_text())["rows"]] == ["peer"]


def test_flops_of_a_strip_in_tiles_are_those_of_its_windows():
    config, settings = configs.Autoencoder(), configs.Inspection()
    flops, moved = inspection.tiles_cost(config, settings, (512, 1024))
    assert flops == inspection.cost(config, (8, 384, 384))[0]
    assert moved == inspection.cost(config, (1, 512, 1024))[1]
    # A strip lower than a window is one.
    assert inspection.tiles_cost(config, settings, (200, 300))[0] == inspection.cost(config, (2, 200, 300))[0]


def test_the_roof_is_the_lower_of_both_ceilings():
    ceilings = {"matmul_tflops": 0.1, "matmul_bf16_tflops": 0.2, "copy_gbs": 10.0}
    row = {"precision": "float32", "flops": 1e9, "bytes": 1e6, "median_ms": 20.0}
    assert benchmark.roof_share(row, ceilings) == pytest.approx(0.5)
    assert benchmark.roof_share(row | {"precision": "bfloat16"}, ceilings) == pytest.approx(0.25)
    assert benchmark.roof_share(row | {"bytes": 1e8}, ceilings) == pytest.approx(0.5)
    assert benchmark.roof_share(row | {"bytes": 2e8}, ceilings) == pytest.approx(1.0)


def test_names_in_the_roofline_do_not_overlap(monkeypatch):
    monkeypatch.setattr(style, "save", lambda figure, path: (figure, path))
    rows = [
        {"work": f"work_{i}", "impl": impl, "flops": 1e9, "bytes": 1e8 / (1 + i % 3), "median_ms": ms}
        for i in range(14)
        for impl, ms in (("steel_ad", 10 + 0.01 * i), ("peer", 1e3))
    ]
    ceilings = {"matmul_tflops": 0.2, "copy_gbs": 30.0}
    figure, path = roofline.roofline("a.png", rows, ceilings, title="Roofline", ours="steel_ad")
    assert path == "a.png"
    figure.draw_without_rendering()
    names = [text for text in figure.axes[0].texts if text.get_text().startswith("work_")]
    assert len(names) == 14
    # An annotation's own extent includes its line.
    boxes = sorted((Text.get_window_extent(text) for text in names), key=lambda box: box.y0)
    assert all(below.y1 <= above.y0 for below, above in itertools.pairwise(boxes))
    panel = figure.axes[0].get_window_extent()
    assert all(box.x0 > panel.x1 and box.y1 < figure.bbox.y1 for box in boxes)


def test_a_work_that_only_a_form_of_ours_did_is_named(monkeypatch):
    monkeypatch.setattr(style, "save", lambda figure, path: (figure, path))
    times = [
        ("both", "steel_ad_bf16"),
        ("both", "steel_ad"),
        ("half", "torch"),
        ("half", "steel_ad_bf16"),
        ("none", "torch"),
    ]
    rows = [
        {"work": work, "impl": impl, "flops": 1e9, "bytes": 1e8, "median_ms": ms}
        for ms, (work, impl) in enumerate(times, 1)
    ]
    ceilings = {"matmul_tflops": 1.0, "copy_gbs": 30.0}
    axes = roofline.roofline("a.png", rows, ceilings, title="Roofline", ours="steel_ad")[0].axes[0]
    names = [text.get_text().split("\n") for text in axes.texts if "\n" in text.get_text()]
    assert sorted((name, rate.split(", ")[1]) for name, rate in names) == [("both", "2 ms"), ("half", "4 ms")]


def test_a_start_that_fails_is_left_out_before_the_first_block(monkeypatch):
    seen = []

    def fails(command, environment):
        assert Path(environment["TMPDIR"]).is_dir()
        (images,) = (word.removeprefix("--data=") for word in command if word.startswith("--data="))
        seen.append(images if images.startswith("procedural/") else len(folders.good_images(Path(images))))
        raise timing.Unavailable("no step")

    drawn = datasets.Dataset("few", Images([np.zeros((8, 8), np.uint8)] * 3), [], [])
    monkeypatch.setattr(datasets, "load", lambda *_: drawn)
    monkeypatch.setattr(cold_start, "first_step", fails)
    for name, make in cold_start.works(tiny=False)[0].makers.items():
        if name != "steel_ad_import_only":
            with pytest.raises(timing.Unavailable):
                make()
    assert seen == ["procedural/teardrop1", 3, "procedural/teardrop1"]
