"""Studies: what they write, that they resume, that reading a model again is what the run itself would give."""

import dataclasses
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest

from configs.autoencoder import PRESETS
from configs.segmentation import PRESETS as SUPERVISED
from steel_ad import config as configs
from steel_ad import files, parallel
from steel_ad.data import datasets, plates
from steel_ad.detectors import autoencoder as detector
from steel_ad.errors import InputError
from steel_ad.report import evaluation as figures
from steel_ad.report import training
from steel_ad.research import reading, results, study_rows, sweep
from steel_ad.research import studies as known_studies
from steel_ad.runs import autoencoder, evaluation, segmentation, transfer
from steel_ad.runs.run import KINDS, Run
from steel_ad.train import fit

ROOT = Path(__file__).parent.parent


def tiny(**settings):
    return configs.Autoencoder(**{**PRESETS["tiny"], **settings})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "line"
    good = np.asarray(plates.to_uint8(plates.render(jax.random.key(0), "teardrop1", size=64, num=8)))
    bad, masks = plates.render_defective(jax.random.key(1), "teardrop1", "smear", size=64, num=3)

    def write(path, image):
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), image)

    for i in range(6):
        write(root / "train" / "good" / f"{i}.png", good[i])
    for i in range(2):
        write(root / "test" / "good" / f"{i}.png", good[6 + i])
    for i in range(3):
        write(root / "test" / "smear" / f"{i}.png", np.asarray(plates.to_uint8(bad))[i])
        write(root / "ground_truth" / "smear" / f"{i}_mask.png", np.asarray(masks)[i].astype(np.uint8) * 255)
    return str(root)


def run(data, workdir, study="", *, values=(), axis="", experiment="autoencoder", config=None, **options):
    studies = known_studies.select(experiment, study.split(",") if study else [], axis, values)
    return sweep.run(config or tiny(), experiment=experiment, studies=studies, data=[data], workdir=workdir, **options)


@pytest.fixture
def without_figures(monkeypatch):
    """Of the runs; they have tests of their own, and take longer than a tiny run."""
    monkeypatch.setattr(training, "training_curve", lambda *a, **k: None)
    for name in ("examples", "score_histogram", "curves"):
        monkeypatch.setattr(figures, name, lambda *a, **k: None)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("sweep") / "w"
    line = [sys.executable, "-m", "experiments.sweep", "--config=configs/autoencoder.py:tiny", "--axis=latent"]
    line += ["--values=8", "--seeds=2", f"--data={data}", f"--workdir={workdir}"]
    line.append(f"--compilation_cache={os.environ['STEEL_AD_TEST_CACHE']}")
    devices = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"}
    run = subprocess.run(line, cwd=ROOT, env=devices, capture_output=True, text=True, timeout=300, check=False)
    return workdir, run


@pytest.mark.slow
@pytest.mark.usefixtures("without_figures")
def test_runs_side_by_side_give_what_each_gives_alone(finished, data, tmp_path):
    workdir, result = finished
    # Both are under way before either is finished, and neither shows a bar of its own.
    first, second, *rest = result.stderr.splitlines()
    assert [line.split(":")[0] for line in (first, second)] == ["run 1 of 2", "run 2 of 2"]
    assert not [line for line in rest if "steps/s" in line]
    alone = run(data, tmp_path / "w", axis="latent", values=["8"])
    both = [r for r in results.read(workdir / "results.csv", study_rows.COLUMNS) if r["seed"] == "0"]
    assert [{k: r[k] for k in results.METRICS} for r in both] == [{k: r[k] for k in results.METRICS} for r in alone]


@pytest.mark.slow
def test_the_binary_runs_a_study(finished, data):
    workdir, result = finished
    assert result.returncode == 0, result.stderr
    assert "run 2 of 2" in result.stderr
    assert "## latent" in result.stdout
    rows = results.read(workdir / "results.csv", study_rows.COLUMNS)
    assert [(r["value"], r["seed"], r["map"]) for r in rows] == [
        ("8", s, m) for s in ("0", "1") for m in ("ssim", "l2")
    ]
    assert set(rows[0]) == set(study_rows.COLUMNS)
    assert json.loads(rows[-1]["settings"]) == {"seed": 1}
    for row in rows:
        record = json.loads((workdir / row["run"] / "metrics.json").read_text())
        assert row["aupro_30"] == record["maps"][row["map"]]["aupro_30"]
        assert row["found_iou_0"] == record["maps"][row["map"]]["defects_found"]["iou_0"]
        assert (record["config"]["latent"], record["config"]["seed"]) == (int(row["value"]), int(row["seed"]))
    names = {p.name for p in workdir.iterdir()}
    assert names == {"runs", "sweep.json", "results.csv", "table.md", "study_latent.png"}
    # A run with the study's own settings is the one that other studies share.
    assert rows[0]["run"].endswith("seed=0")


@pytest.mark.slow
@pytest.mark.usefixtures("without_figures")
def test_nothing_is_trained_twice_and_other_studies_share_the_runs(finished, data, monkeypatch):
    workdir, _ = finished
    before = results.read(workdir / "results.csv", study_rows.COLUMNS)
    monkeypatch.setattr(detector, "train", lambda *a, **k: pytest.fail("trained again"))
    # Rows had a column more once.
    files.write_csv(workdir / "results.csv", [{**r, "command": "python -m experiments.sweep"} for r in before])
    assert run(data, workdir, axis="latent", values=["8"], seeds=2) == before
    assert results.read(workdir / "results.csv", study_rows.COLUMNS) == before
    rows = run(data, workdir, "percentile,radius,stride,map")
    assert {r["study"] for r in rows} == {"latent", "percentile", "radius", "stride", "map"}
    record = json.loads((workdir / rows[0]["run"] / "metrics.json").read_text())
    own = {"percentile": "98", "radius": "4", "stride": "16", "residual_constants": "thesis"}
    same = [r for r in rows if own.get(r["axis"]) == r["value"]]
    assert len(same) == 8
    for row in same:
        for metric in ("pixel_auroc", "aupro_30", "pixel_iou", "image_auroc", "threshold", "image_threshold"):
            assert row[metric] == pytest.approx(record["maps"][row["map"]][metric], abs=2e-5), (row["axis"], metric)
    values = [r["value"] for r in rows if r["study"] == "stride" and r["map"] == "ssim"]
    assert values == ["32", "16"]  # those which fit into the patch, as the others do not
    # Read once, rows are kept.
    monkeypatch.setattr(reading, "Reader", lambda *a: pytest.fail("read again"))
    assert run(data, workdir, "percentile,radius,stride,map") == rows
    # All of it is gathered, with the settings of each row.
    methods, gathered = results.gather([workdir])
    assert len(gathered) == len(rows)
    assert {r["seed"] for r in methods} == {"0", "1"}
    for row in gathered:
        made_with = results.settings(row)
        assert (str(made_with["seed"]), made_with["data"]) == (row["seed"], Path(data).name)
        assert known_studies.text(made_with[row["axis"]]) == row["value"]
    assert len({(r["base"], r["study"]) for r in gathered}) == 5


@pytest.mark.slow
def test_reading_again_is_evaluating_again(finished, data):
    """In any order: what was kept from other settings does not leak into these."""
    (folder,) = (finished[0] / "runs").glob("*/seed=0")
    dataset = datasets.load(data)
    _, validation = datasets.split(6, 0.2, 0)
    good = [dataset.train[i] for i in validation]
    params = Run.open(folder).detector().state
    reader = reading.Reader(tiny(), params, good, dataset.test, [8, 16])
    reader.read(tiny())
    for change in ({"radius": 1, "percentile": 60.0}, {"window_size": 5}, {"stride": 8, "residual_constants": "wang"}):
        config = tiny(**change)
        mapper = evaluation.Mapper(detector.AutoencoderDetector(config), config.radius)
        maps, _ = mapper(params, [t.image for t in dataset.test], label="test")
        found, limits = reader.read(config)
        assert list(found) == ["ssim", "l2"]
        for name, calibrating in mapper(params, good, label="calibrate")[0].items():
            expected = evaluation.thresholds(calibrating, config.percentile)
            assert limits[name].pixel == pytest.approx(expected.pixel, rel=1e-4)
            assert limits[name].image == pytest.approx(expected.image, rel=1e-4)
            measured = evaluation.measure(maps[name], dataset.test, limits[name])
            for metric in ("pixel_auroc", "aupro_05", "pixel_dice", "image_auroc", "false_regions_per_image"):
                assert found[name][metric] == pytest.approx(measured[metric], abs=2e-4), metric


def test_reconstructions_share_windows_of_any_image(monkeypatch):
    config = tiny()
    params = detector.initial_state(config, jax.random.key(0)).params
    image = np.random.default_rng(0).random((70, 53)).astype(np.float32)
    found = detector.reconstructions(config, params, image, [8, 24, 32])
    for stride, one in zip([8, 24, 32], found, strict=True):
        expected = detector.reconstruct(dataclasses.replace(config, stride=stride), params, image)
        np.testing.assert_allclose(one, expected, atol=1e-6)
    # As many windows as are not kept at once come stride by stride.
    whole, strides = detector.reconstruct, []
    monkeypatch.setattr(detector, "_KEPT", 20)
    monkeypatch.setattr(detector, "reconstruct", lambda c, *a: (strides.append(c.stride), whole(c, *a))[1])
    for one, same in zip(found, detector.reconstructions(config, params, image, [8, 24, 32]), strict=True):
        np.testing.assert_allclose(same, one, atol=1e-6)
    assert strides == [8, 24, 32]
    assert list(reading._families([128, 48, 32, 96, 32])) == [[32, 96, 128], [48]]


def test_what_remembers_data_is_asked_for_it_as_load_is():
    """Whoever gives no further argument gets the same images from either."""
    asked = [inspect.signature(f).parameters.values() for f in (datasets.Load.__call__, sweep._loader(1, 1))]
    whole = inspect.signature(datasets.load).parameters
    for parameters in asked:
        left_out = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        assert left_out == {name: whole[name].default for name in ("min_size", "resident")}


@pytest.mark.slow
@pytest.mark.usefixtures("without_figures")
def test_an_interrupted_study_goes_on(data, tmp_path, monkeypatch):
    whole, trained, loaded = autoencoder.run, [], []
    train, load = detector.train, datasets.load

    def interrupted(config, **options):
        if config.seed == 1:
            raise KeyboardInterrupt
        return whole(config, **options)

    monkeypatch.setattr(detector, "train", lambda c, *a, **k: (trained.append(c.seed), train(c, *a, **k))[1])
    monkeypatch.setattr(datasets, "load", lambda d, **k: (loaded.append(d), load(d, **k))[1])
    fit._step.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(autoencoder, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(data, tmp_path, "seeds")
    assert [r["seed"] for r in results.read(tmp_path / "results.csv", study_rows.COLUMNS)] == ["0", "0"]
    rows = run(data, tmp_path, "seeds")
    assert trained == [0, 1, 2]
    assert loaded == [data, data]  # once a call
    assert [r["value"] for r in rows] == ["0", "0", "1", "1", "2", "2"]
    assert rows[0]["pixel_auroc"] != rows[2]["pixel_auroc"]
    # One step for all seeds, traced once.
    assert fit._step.cache_info().misses == 1
    step = fit.step_of(detector.stage(tiny()), parallel.mesh())
    assert step._cache_size() == 1
    assert fit._step.cache_info().misses == 1


def test_a_run_that_dies_does_not_end_the_study(data, tmp_path, monkeypatch):
    def dies(config, *, workdir, **options):
        if config.latent == 4:
            raise InputError("training is dead", status=1)
        maps = {"ssim": {"pixel_auroc": 0.5}}
        return {"experiment": "autoencoder", "dataset": "line", "maps": maps, "config": {"seed": 0}}

    monkeypatch.setattr(autoencoder, "run", dies)
    with pytest.raises(InputError, match=r"1 of 3 runs failed.*latent=4.*dead") as error:
        run(data, tmp_path, axis="latent", values=["2", "4", "6"])
    assert error.value.status == 1
    assert [r["value"] for r in results.read(tmp_path / "results.csv", study_rows.COLUMNS)] == ["2", "6"]


@pytest.mark.slow
@pytest.mark.usefixtures("without_figures")
def test_supervised_studies(data, tmp_path, monkeypatch):
    config = configs.Segmentation(**SUPERVISED["tiny"])
    rows = run(data, tmp_path / "s", "ratio", values=["1:1"], experiment="segmentation", config=config)
    assert [(r["value"], r["map"]) for r in rows] == [("1:1", "segmentation"), ("1:1", "classification")]
    assert rows[0]["pixel_auroc"] is not None
    assert rows[1]["pixel_auroc"] is None
    seen = []

    def transferred(config, *, source, target, **options):
        seen.append((config.optimizer, config.adadelta, source, target))
        part = {"dataset": "line", "train_seconds": 1.0, "maps": {"segmentation": {"pixel_auroc": 0.5}}}
        parts = {w: {"experiment": "transfer, x", **part} for w in ("source", "target")}
        parts["target"]["dataset"] = Path(target).name
        return {"experiment": "transfer", "config": {"seed": 0}, "before": parts, "after": parts}

    monkeypatch.setattr(transfer, "run", transferred)
    rows = run(data, tmp_path / "t", "adadelta", experiment="transfer", config=config, source=data + "/")
    assert json.loads((tmp_path / "t" / "sweep.json").read_text())["source"] == data
    assert seen == [("adadelta", k, data + "/", data) for k in ("tf_keras", "old_keras", "pytorch")]
    assert [r["dataset"] for r in rows[:2]] == ["line (to line)", "line"]
    assert [r["map"] for r in rows[:4]] == [
        f"{when} {where} segmentation" for when in ("before", "after") for where in ("source", "target")
    ]


def test_every_study_changes_what_it_says():
    """And nothing but that and what makes it count; the settings accept every value."""
    extra = {
        "window_size": {"loss_options"},
        "epochs": {"steps"},
        "decay": {"weight_decay"},
        "adadelta": {"optimizer", "learning_rate", "warmup_steps", "schedule"},
        "adapt_epochs": {"adapt_steps"},
    }
    quick = {"autoencoder": PRESETS["quick"], "segmentation": SUPERVISED["quick"], "transfer": SUPERVISED["quick"]}
    for experiment, studies in known_studies.STUDIES.items():
        base = KINDS[experiment].config(**quick[experiment])
        for axis in studies.values():
            for value in axis.values:
                config = axis.apply(base, value)
                assert getattr(config, axis.field) == value
                before, after = configs.to_dict(base), configs.to_dict(config)
                assert {k for k in after if after[k] != before[k]} <= {axis.field} | extra.get(axis.field, set())
    window = known_studies.STUDIES["autoencoder"]["window"].apply(tiny(), 7)
    assert window.loss_options == {"window_size": 7}
    assert known_studies.STUDIES["autoencoder"]["window"].apply(tiny(loss="l2"), 7).loss_options == {}


def test_an_axis_of_a_setting_alone_has_an_effect():
    quick = {"autoencoder": PRESETS["quick"], "segmentation": SUPERVISED["quick"], "transfer": SUPERVISED["quick"]}

    def applied(experiment, field, value):
        (axis,) = known_studies.select(experiment, [], field, [value]).values()
        return axis.apply(KINDS[experiment].config(**quick[experiment]), axis.values[0])

    assert applied("autoencoder", "epochs", "2").total_steps == 2 * 625
    assert applied("autoencoder", "decay", "learning_rate").weight_decay > 0
    assert applied("segmentation", "adadelta", "pytorch").optimizer == "adadelta"
    assert applied("transfer", "epochs", "2").total_steps == 2 * 250
    assert applied("segmentation", "classifier_epochs", "2").total_classifier_steps == 2 * 250
    for experiment, field in (("autoencoder", "num_crops"), ("segmentation", "samples"), ("segmentation", "new_line")):
        base = KINDS[experiment].config(**quick[experiment])
        with pytest.raises(InputError, match=f"{field} changes nothing"):
            run("nowhere", Path("nowhere"), axis=field, values=["1"], experiment=experiment, config=base)


def test_what_is_wrong_is_said_before_anything_is_run(data, tmp_path, monkeypatch):
    monkeypatch.setattr(autoencoder, "run", lambda *a, **k: pytest.fail("was run"))
    with pytest.raises(InputError, match=r"train_images=50.*only 5"):
        run(data, tmp_path / "w", axis="train_images", values=["2", "50"])
    with pytest.raises(InputError, match="too small for every value"):
        run(data, tmp_path / "w", "samples")

    def no_defects(*arguments, **options):
        raise InputError("there is no folder of defects")

    monkeypatch.setattr(segmentation, "run", no_defects)
    config = configs.Segmentation(**SUPERVISED["tiny"])
    with pytest.raises(InputError, match="no folder of defects"):
        run(data, tmp_path / "w", "ratio", experiment="segmentation", config=config)
    assert not (tmp_path / "w").exists()


def test_where_runs_of_the_folder_one_is_in_go(data, monkeypatch):
    monkeypatch.chdir(data)
    assert sweep._dataset_folder(".") == "_".join(Path(data).parts[-2:])


@pytest.mark.parametrize(
    ("study", "axis", "values", "said"),
    [
        ("latnt", "", [], "no study 'latnt'.*latent"),
        ("ratio", "", [], "no study 'ratio' of the experiment autoencoder"),
        ("", "", [], "either --study"),
        ("latent", "latent", ["1"], "either --study"),
        ("latent,loss", "", ["1"], "--values are those of one study"),
        ("", "latent", [], "needs --values"),
        ("", "latnt", ["1"], "--axis=latnt.*latent"),
        ("", "loss_options", ["1"], "--axis=loss_options"),
        ("latent", "", ["many"], "--values=many must be a whole number"),
        ("", "learning_rate", ["0.1", "x"], "--values=x must be a finite number"),
        ("", "flips", ["yes"], "--values=yes must be true or false"),
        ("latent", "", ["0"], "latent=0 must be at least 1"),
        ("loss", "", ["l3"], "no loss 'l3'"),
        ("samples", "", ["50"], "train_images=50.*only 5"),
        ("patch_size", "", ["32", "128"], "smaller than the patch of 128"),
    ],
)
def test_what_cannot_be_studied(data, tmp_path, study, axis, values, said):
    with pytest.raises(InputError, match=said) as error:
        run(data, tmp_path / "w", study, axis=axis, values=values)
    assert "\n" not in str(error.value)
    assert error.value.status == 2
    assert not (tmp_path / "w" / "results.csv").exists()


@pytest.mark.slow
def test_studies_of_another_config_or_data(finished, data, tmp_path):
    with pytest.raises(InputError, match=r"another config.*batch_size"):
        run(data, finished[0], "latent", config=tiny(batch_size=2))
    with pytest.raises(InputError, match="no test images"):
        run(str(Path(data) / "train" / "good"), tmp_path / "w", "latent")
    (tmp_path / "line").mkdir()
    with pytest.raises(InputError, match="two data sets are called 'line'"):
        sweep.run(
            tiny(),
            experiment="autoencoder",
            studies=known_studies.select("autoencoder", ["latent"], "", []),
            data=[data, str(tmp_path / "line")],
            workdir=tmp_path / "w",
        )
    with pytest.raises(InputError, match="another data set called 'line'"):
        run(str(tmp_path / "line"), finished[0], "latent")
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("without_figures")
def test_some_of_the_training_images(data, tmp_path):
    train, _ = datasets.split(40, 0.2, 0)
    few, more = (datasets.chosen(train, n, 0) for n in (5, 20))
    assert len(few) == 5
    assert set(few) < set(more) < set(train)
    assert set(few) != set(train[:5])
    np.testing.assert_array_equal(datasets.chosen(train, 0, 0), train)
    workdir = tmp_path / "w"
    record = autoencoder.run(tiny(train_images=2), data=data, workdir=workdir)
    assert record["images"]["train"] == 2
    uses = [row["use"] for row in json.loads((workdir / "manifest.json").read_text())]
    assert sorted(uses) == ["none"] * 3 + ["train"] * 2 + ["validation"]


@pytest.mark.slow
def test_runs_from_before_a_setting_existed_go_on(finished, data, tmp_path):
    import shutil

    (folder,) = (finished[0] / "runs").glob("*/seed=0")
    shutil.copytree(folder, tmp_path / "w")
    for name in ("config.json", "metrics.json"):
        record = json.loads((tmp_path / "w" / name).read_text())
        settings = record["config"] if name == "metrics.json" else record
        for later in ("train_images", "data_path", "resident_mb"):
            del settings[later]
        (tmp_path / "w" / name).write_text(json.dumps(record))
    before = (tmp_path / "w" / "metrics.json").stat().st_mtime_ns
    autoencoder.run(tiny(), data=data, workdir=tmp_path / "w")
    assert (tmp_path / "w" / "metrics.json").stat().st_mtime_ns == before
    with pytest.raises(InputError, match=r"train_images \(2 here, 0 there\)"):
        autoencoder.run(tiny(train_images=2), data=data, workdir=tmp_path / "w")


def test_procedural_plates_of_another_size(monkeypatch):
    for name in ("_TRAIN", "_GOOD", "_DEFECTIVE"):
        monkeypatch.setattr(datasets, name, 1)
    dataset = datasets.load("procedural/teardrop1/128", min_size=128)
    images = [*dataset.train, *(t.image for t in dataset.test), *(t.mask for t in dataset.test)]
    assert {i.shape for i in images} == {(128, 128)}
    assert dataset.name == "procedural_teardrop1_128"
    for data, said in (
        ("teardrop1/128", "smaller than the patch"),
        ("teardrop1/7", "SIDE"),
        ("teardrop1/128/2", "SIDE"),
    ):
        with pytest.raises(InputError, match=said):
            datasets.load(f"procedural/{data}", min_size=144)


def test_a_studys_figure_has_every_seeds_metric_by_data_map_and_value():
    def row(value, seed, auroc, *, axis="latent", name="ssim", dataset="lens"):
        return {
            "experiment": "autoencoder",
            "study": "latent",
            "axis": axis,
            "value": value,
            "seed": seed,
            **dict.fromkeys(study_rows.SHOWN),
            "dataset": dataset,
            "map": name,
            "pixel_auroc": auroc,
        }

    rows = [row("100", 0, 0.5), row("20", 0, 0.25), row("20", 1, 0.75), row("20", 0, 0.125, name="l2")]
    shown = study_rows.figure(rows)
    nothing = {key: [] for key in list(study_rows.SHOWN)[1:]}
    assert shown["found"] == {
        ("lens", "ssim"): {
            "100": {"pixel_auroc": [0.5], **nothing},
            "20": {"pixel_auroc": [0.25, 0.75], **nothing},
        },
        ("lens", "l2"): {"20": {"pixel_auroc": [0.125], **nothing}},
    }
    assert (shown["values"], shown["axis"], shown["metrics"]) == (["20", "100"], "latent", study_rows.SHOWN)
    assert shown["title"] == "autoencoder: latent, median and range of 2 seeds"
    assert study_rows.figure(rows[:2])["title"] == "autoencoder: latent"
    assert study_rows.figure([row(str(k), k, 0.5, axis="seed") for k in range(2)])["title"] == "autoencoder: latent"
