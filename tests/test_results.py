"""The results page: what is gathered, that the page follows from the CSV files alone, and how claims are judged."""

import contextlib
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from steel_ad import config as configs
from steel_ad import files, recipes
from steel_ad.errors import InputError
from steel_ad.research import claims, results, wording
from steel_ad.research import results_page as page
from steel_ad.runs.run import KINDS

ROOT = Path(__file__).parent.parent
METRICS = {"pixel_auroc": 0.9, "aupro_30": 0.8, "image_accuracy": 0.7, "defects_found": {"iou_0": 1.0, "iou_30": 0.5}}


def settings(experiment, preset, **changed):
    """All settings of a run, as its record has them."""
    known = recipes.presets("segmentation" if experiment == "transfer" else experiment)[preset]
    return configs.to_dict(KINDS[experiment].config(**known)) | changed


def record(
    experiment="autoencoder", preset="quick", *, maps=None, dataset="lens", data="/x/lens", extra=None, **changed
):
    config = settings(experiment, preset, data=data, **changed)
    return {
        "experiment": experiment,
        "dataset": dataset,
        "config": config,
        "percentile": config["percentile"],
        "maps": maps or {"ssim": METRICS, "l2": {**METRICS, "pixel_auroc": None}},
        "train_seconds": 120.0,
        "test_megapixels_per_second": 0.5,
        "parameters": 1048549,
        "versions": {"device": "cpu"},
        **(extra or {}),
    }


def write(folder, *records):
    for i, r in enumerate(records):
        files.write_json(folder / str(i) / "metrics.json", r)
    return folder


def test_the_identity_of_settings():
    base = configs.Autoencoder(loss_options={"weight": 0.5, "alpha": 1})
    same = configs.Autoencoder(weight_decay=1e-5, percentile=98, loss_options={"alpha": 1.0, "weight": 0.5})
    assert configs.canonical(base) == configs.canonical(same) == configs.canonical(configs.to_dict(base))
    assert json.loads(configs.canonical(base))["maps"] == ["ssim", "l2"]
    others = [{"seed": 1}, {"percentile": 98.5}, {"maps": ("l2", "ssim")}, {"loss_options": {"weight": 0.5}}]
    texts = {configs.identity(configs.to_dict(dataclasses.replace(base, **o))) for o in ({}, *others)}
    assert len(texts) == 1 + len(others)
    assert configs.identity({"b": [1.5], "a": True}) == "b20a7c9ce40647a6"


def test_a_run_as_rows():
    first, second = results.rows(record(seed=3))
    assert set(first) == set(results.ROW)
    assert (first["map"], first["seed"], first["dataset"], first["device"]) == ("ssim", 3, "lens", "cpu")
    assert (first["pixel_auroc"], first["found_iou_30"], first["image_auroc"]) == (0.9, 0.5, None)
    assert second["pixel_auroc"] is None
    part = {"experiment": "transfer, x", "dataset": "a", "maps": {"segmentation": {"pixel_auroc": 0.5}}}
    other = {**part, "dataset": "b"}
    both = {"source": part, "target": other}
    found = results.rows({"experiment": "transfer", "config": {"seed": 1}, "before": both, "after": both})
    assert [(r["map"], r["dataset"]) for r in found] == [
        (f"{when} {where} segmentation", d)
        for when in ("before", "after")
        for where, d in (("source", "a"), ("target", "b"))
    ]
    assert {r["experiment"] for r in found} == {"transfer"}


def test_rows_survive_a_file(tmp_path):
    rows = [
        {**r, "seed": "0", "settings": "{}"} for r in results.rows(record(maps={"ssim": {"pixel_auroc": 0.1 + 0.2}}))
    ]
    files.write_csv(tmp_path / "a.csv", rows)
    assert results.read(tmp_path / "a.csv", results.ROW) == rows
    # Files from before a metric existed have none of it; what is no metric must be there.
    for lost in ("aupimo", "device"):
        files.write_csv(tmp_path / "a.csv", [{k: v for k, v in rows[0].items() if k != lost}])
        with contextlib.nullcontext() if lost == "aupimo" else pytest.raises(InputError, match="damaged"):
            assert results.read(tmp_path / "a.csv", results.ROW) == [{**rows[0], "aupimo": None}]
    for change, said in (({"seed": "x"}, "seed|invalid"), ({"settings": "[]"}, "list"), ({"experiment": "x"}, "'x'")):
        files.write_csv(tmp_path / "a.csv", [{**rows[0], **change}])
        with pytest.raises(InputError, match=rf"a\.csv is damaged.*({said})"):
            results.read(tmp_path / "a.csv", results.ROW)
    with pytest.raises(InputError, match=r"there is no .*b\.csv"):
        results.read(tmp_path / "b.csv", results.ROW)


def spectral(**changed):
    """What `runs.spectrum` records: costs of each map, none of the training."""
    maps = {"whitening": {"pixel_auroc": 0.86}, "lattice": {"pixel_auroc": 0.94}}
    made = record("spectrum", "default", maps=maps, **changed)
    del made["train_seconds"]
    speeds = {"whitening": 5.0, "lattice": 3.0}
    return made | {"fit_seconds": {"whitening": 1.0, "lattice": 2.0}, "test_megapixels_per_second": speeds}


def test_costs_of_each_map_survive_a_file(tmp_path):
    methods, _ = results.gather([write(tmp_path / "runs", spectral(), spectral(detail=0.0))])
    files.write_csv(tmp_path / "a.csv", methods)
    found = [r for r in results.read(tmp_path / "a.csv", results.METHODS) if r["map"] == "lattice"]
    assert [(r["train_seconds"], r["test_megapixels_per_second"]) for r in found] == [(2.0, 3.0)] * 2
    assert {wording.run_command(r) for r in found} == {
        "python -m experiments.spectrum --config=default --data=lens --workdir=W",
        "python -m experiments.spectrum --config=default --config.detail=0 --data=lens --workdir=W",
    }


def row_of(experiment, preset, *, name="ssim", **changed):
    """A row of methods with a preset's settings and changes, of the map `name`."""
    made_with = results._complete("p", experiment, settings(experiment, preset, **changed))
    return {"experiment": experiment, "map": name, **results._named(experiment, made_with)}


def test_a_row_says_its_settings_by_what_differs_from_the_defaults():
    row = row_of("autoencoder", "quick", data="/x/lens", loss_options={"weight": 0.3})
    changed = json.loads(row["settings"])
    assert (changed["data"], changed["steps"], changed["loss_options.weight"]) == ("lens", 1500, 0.3)
    assert "latent" not in changed
    # A setting that came later has its default in rows of before, and the identity of these stays.
    every = settings("autoencoder", "quick", data="lens") | {"loss_options.weight": 0.3}
    assert results.settings(row) == {k: v for k, v in every.items() if k != "loss_options"}
    later = row_of(
        "autoencoder", "quick", data="lens", loss_options={"weight": 0.3}, latent=100, validation_fraction=0.2
    )
    assert later == row
    assert row_of("autoencoder", "quick", data="lens", loss_options={"weight": 0.3}, seed=1)["run"] != row["run"]
    assert results.without(row, "seed", "loss") == results.without(
        row_of("autoencoder", "quick", data="lens", loss_options={"weight": 0.3}, seed=4, loss="l2"), "seed", "loss"
    )
    assert results.without(row, "seed") != results.without(row_of("autoencoder", "quick", data="worn"), "seed")


@pytest.mark.parametrize(
    ("row", "called"),
    [
        (row_of("autoencoder", "quick"), "SSIM-AE (wang), SSIM map (thesis)"),
        (row_of("autoencoder", "quick", name="l2", loss="ssim_l2"), "SSIM and L2-AE (wang), L2 map"),
        (row_of("autoencoder", "quick", name="l2", loss="l1", constants="thesis"), "L1-AE, L2 map"),
        (row_of("autoencoder", "quick", name="l2", loss="my:loss", model="my:Net"), "my:loss-AE of my:Net, L2 map"),
        (
            row_of("segmentation", "quick", name="classification", defects="labelled"),
            "U-Net (bce_dice), labelled defects, classifier",
        ),
        (
            row_of("segmentation", "thesis", name="segmentation", model="compact_cnn", defects="/d/steel"),
            "CompactCNN (mse), inserted defects, map",
        ),
        (
            row_of("transfer", "quick", name="after target segmentation", source="/x/a", target="procedural/diamond"),
            "U-Net (bce_dice), a to diamond, after adapting, map",
        ),
        (row_of("spectrum", "default", name="lattice"), "Lattice neighbours"),
        (row_of("spectrum", "default", name="my:Detector"), "my:Detector"),
    ],
)
def test_what_a_method_is_called(row, called):
    assert wording.method(row) == called


def test_a_method_is_its_settings_and_its_map():
    def same(a, b):
        return results.method(a) == results.method(b)

    ssim, l2 = row_of("autoencoder", "quick"), row_of("autoencoder", "quick", name="l2", loss="l2")
    assert same(ssim, row_of("autoencoder", "quick", seed=2, steps=7, data="worn"))
    # Constants of an SSIM that is not used make no difference.
    assert same(l2, row_of("autoencoder", "quick", name="l2", loss="l2", constants="thesis", residual_constants="wang"))
    for other in (
        {"name": "l2"},
        {"loss": "l2"},
        {"constants": "thesis"},
        {"residual_constants": "wang"},
        {"model": "m:N"},
    ):
        assert not same(ssim, row_of("autoencoder", "quick", **other))
    inserted = row_of("segmentation", "quick", defects="steel")
    assert same(inserted, row_of("segmentation", "quick", defects="procedural", width=3))
    for other in ({"defects": "labelled"}, {"model": "compact_cnn"}, {"loss": "mse"}):
        assert not same(inserted, row_of("segmentation", "quick", **{"defects": "steel", **other}))


def test_the_command_of_a_run_and_of_a_study():
    row = row_of("autoencoder", "quick", loss="l2", seed=2, loss_options={"weight": 0.3}, data="a b", flips=True)
    assert wording.run_command(row) == (
        "python -m experiments.autoencoder --config=quick --config.flips=true --config.loss=l2 --loss_option=weight=0.3 "
        "'--data=a b' --workdir=W"
    )

    def rows(study, values, data, seeds, experiment="segmentation", axis="", **changed):
        head = {"study": study, "axis": axis or study}
        return [
            {**head, "value": str(v), "seed": str(s)}
            | row_of(experiment, "quick", **{"seed": s, "defects": "steel", "data": d, **changed, axis or study: v})
            for v in values
            for d in data
            for s in seeds
        ]

    found = rows("ratio", ("1:0", "1:1"), "ab", (3, 4), steps=5) + rows("ratio", ("1:1",), "c", (0,), steps=5)
    start = "python -m experiments.sweep --study=ratio"
    assert wording.study_commands(found) == [
        f"{start} --values=1:0,1:1 --experiment=segmentation --config=quick --config.steps=5 --config.seed=3 --seeds=2 "
        "--data=a,b --defects=steel --workdir=W",
        f"{start} --values=1:1 --experiment=segmentation --config=quick --config.steps=5 --data=c --defects=steel --workdir=W",
    ]
    (line,) = wording.study_commands(rows("batch_size", (16, 4), "a", (0,)))
    assert "--axis=batch_size --values=4,16 " in line
    (line,) = wording.study_commands(rows("seeds", (0, 1), "a", (0,), axis="seed"))
    assert "--study=seeds --values=0,1 " in line
    assert "--config.seed" not in line
    # What a study changes along with its axis is no setting of the command, what its runs have in common is.
    options = [{"window_size": 3, "alpha": 2.0}, {"window_size": 7, "alpha": 2.0}]
    windows = [
        rows("window", (o["window_size"],), "a", (0,), "autoencoder", "window_size", loss_options=o) for o in options
    ]
    (line,) = wording.study_commands([row for some in windows for row in some])
    assert line == (
        "python -m experiments.sweep --study=window --values=3,7 --config=quick --loss_option=alpha=2 --data=a --workdir=W"
    )


def test_what_is_gathered(tmp_path):
    seg = record("segmentation", maps={"segmentation": {"pixel_auroc": 0.99}}, defects="/d/strip-defects")
    lattice = record("spectrum", "default", maps={"lattice": {"pixel_auroc": 0.94}})
    runs = [
        *(record(), record(seed=1), record(loss="l2"), record(), seg, lattice),  # the fourth is the first again
        record(seed=5, extra={"finished": False}),
        {**seg, "experiment": "transfer, before"},
        {"something": "else"},
    ]
    folder = write(tmp_path / "runs", *runs)
    # Of a study, runs that differ in what makes a method count as one, others do not.
    study = tmp_path / "sweep"
    base = settings("autoencoder", "quick")
    files.write_json(study / "sweep.json", {"experiment": "autoencoder", "source": "", "defects": "", **base})
    write(study / "runs" / "lens", record(seed=7), record(latent=32, seed=8))
    files.write_json(study / "runs" / "lens" / "0" / "config.json", {**base, "data": "/x/lens"})
    row = {"study": "map", "axis": "residual_constants", "value": "wang", **results.rows(record(seed=7))[0]}
    row |= {"settings": '{"residual_constants": "wang", "seed": 7}', "run": "runs/lens/0"}
    files.write_csv(study / "results.csv", [row, {**row, "map": "l2"}])

    methods, studies = results.gather([folder, study, folder])
    found = [(wording.method(r), r["seed"]) for r in methods]
    assert sorted(found) == sorted(
        [
            *((f"SSIM-AE (wang), {m}", s) for m in ("SSIM map (thesis)", "L2 map") for s in ("0", "1", "7")),
            ("SSIM-AE (wang), SSIM map (wang)", "7"),
            *(("L2-AE, SSIM map (thesis)", "0"), ("L2-AE, L2 map", "0")),
            ("U-Net (bce_dice), inserted defects, map", "0"),
            ("Lattice neighbours", "0"),
        ]
    )
    assert [r["map"] for r in studies] == ["l2", "ssim"]
    assert not any("/x" in r["settings"] or "/d/" in r["settings"] for r in (*methods, *studies))
    assert [results.settings(r)["residual_constants"] for r in studies] == ["wang"] * 2
    assert {r["base"] for r in studies} == {row_of("autoencoder", "quick")["run"]}
    assert ("python -m experiments.segmentation --config=quick --data=lens --defects=strip-defects --workdir=W") in {
        wording.run_command(r) for r in methods
    }
    # What a run read again gives is the row that its own run would have.
    (again,) = (r for r in methods if wording.method(r) == "SSIM-AE (wang), SSIM map (wang)")
    write(tmp_path / "own", record(seed=7, residual_constants="wang"))
    own = results.gather([tmp_path / "own"])[0]
    assert again["run"] in {r["run"] for r in own}


def test_what_cannot_be_gathered(tmp_path):
    with pytest.raises(InputError, match="there is no folder"):
        results.gather([tmp_path / "none"])
    with pytest.raises(InputError, match="no finished run"):
        results.gather([write(tmp_path / "a", {"something": "else"})])
    with pytest.raises(InputError, match=r"no record of a run.*lattent"):
        results.gather([write(tmp_path / "b", record(lattent=3))])
    with pytest.raises(InputError, match=r"there is no .*methods"):
        page.render(tmp_path / "page.md")
    assert not (tmp_path / "page.md").exists()


def study_rows(study, values, *, dataset="lens", name="segmentation", metric="pixel_auroc"):
    """`values`: value of the axis -> numbers of the seeds."""
    head = dict.fromkeys(results.ROW, None) | {"study": study, "axis": study, "base": "b"}
    return [
        {**head, "value": v, "dataset": dataset, "seed": str(s), metric: x}
        | row_of("segmentation", "quick", name=name, data=dataset, seed=s)
        for v, numbers in values.items()
        for s, x in enumerate(numbers)
    ]


def test_a_claim_is_judged_by_its_interval():
    epochs, ratio, *_, stride = claims.CLAIMS
    rng = np.random.default_rng(0)
    few, many = 0.95 + 0.004 * rng.standard_normal((2, 5))
    rows = study_rows("epochs", {"25": few, "100": many})
    _, (found,) = claims.judge(epochs, [], rows)
    interval = stats.ttest_rel(few, many).confidence_interval(0.95)
    assert (found.seeds, found.dataset) == (5, "lens")
    assert found.mean == pytest.approx(np.mean(few - many))
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))

    def verdict(claim, rows):
        overall, found = claims.judge(claim, [], rows)
        return overall, [j.verdict for j in found]

    # Studies of another base are judged by themselves.
    other = [{**r, "base": "c"} if int(r["seed"]) > 2 else r for r in rows]
    assert [j.seeds for j in claims.judge(epochs, [], other)[1]] == [3, 2]

    steady = np.array([0.900, 0.901, 0.902])
    noise = np.array([0.0, 0.001, -0.001])
    assert verdict(epochs, study_rows("epochs", {"25": steady, "100": steady + 0.002})) == ("confirmed", ["holds"])
    assert verdict(epochs, study_rows("epochs", {"25": steady, "100": steady + 0.05 + noise})) == ("refuted", ["fails"])
    assert verdict(epochs, study_rows("epochs", {"25": steady, "100": steady + 50 * noise})) == ("undecided", ["open"])
    assert verdict(epochs, study_rows("epochs", {"25": steady[:2], "100": steady[:2]})) == ("undecided", ["open"])
    assert verdict(epochs, []) == ("undecided", [])
    # The better mixture counts, where both are there, and seeds are paired; one data set that fails refutes.
    good = study_rows("ratio", {"1:0": steady, "1:1": steady - 0.5, "1:3": steady + 0.01})
    assert verdict(ratio, good) == ("confirmed", ["holds"])
    half = {"1:0": steady, "1:1": steady - 0.5}
    assert verdict(ratio, good + study_rows("ratio", half, dataset="worn")) == ("confirmed", ["holds"])
    bad = study_rows("ratio", {**half, "1:3": steady - 0.4}, dataset="worn")
    assert verdict(ratio, good + bad) == ("refuted", ["holds", "fails"])
    windows = study_rows("stride", {"32": steady + 0.02, "128": steady, "16": steady + 1}, name="ssim")
    assert verdict(stride, windows) == ("confirmed", ["holds"])


def test_the_better_of_several_is_not_chosen_seed_by_seed():
    """Two mixtures that are each as good as none, with noise: their better one by seed is above it, their mean is not."""
    ratio = claims.CLAIMS[1]
    rng = np.random.default_rng(1)
    wrong = 0
    for _ in range(200):
        none, one, three = 0.9 + 0.01 * rng.standard_normal((3, 6))
        overall, (found,) = claims.judge(ratio, [], study_rows("ratio", {"1:0": none, "1:1": one, "1:3": three}))
        wrong += overall == "confirmed"
    assert wrong <= 12  # 2.5 % of 200 are 5; by seed it would be 31
    intervals = [stats.ttest_rel(x, none).confidence_interval(0.975) for x in (one, three)]
    assert found.low == pytest.approx(max(i.low for i in intervals))
    assert found.high == pytest.approx(max(i.high for i in intervals))


def test_methods_are_compared_where_all_else_is_shared(tmp_path):
    def run(seed, aupro, **settings):
        maps = {m: {"aupro_30": a} for m, a in aupro.items()}
        return record(seed=seed, maps=maps, **settings)

    runs = [run(s, {"ssim": 0.9, "l2": 0.6 + 0.01 * s}) for s in range(3)]
    runs += [run(s, {"ssim": 0.99, "l2": 0.7}, loss="l2") for s in range(3)]
    runs += [run(s, {"ssim": 0.1, "l2": 0.7}, steps=5, loss=loss) for s in range(2) for loss in ("ssim", "l2")]
    runs += [run(s, {"ssim": 0.9, "l2": 0.7}, steps=6) for s in range(3)]  # nothing without an L2-AE
    nets = {"unet": 0.9, "compact_cnn": 0.8}
    runs += [
        run(s, {"segmentation": a + 0.01 * s}, experiment="segmentation", model=m)
        for s in range(3)
        for m, a in nets.items()
    ]
    methods, _ = results.gather([write(tmp_path, *runs)])
    networks, ssim = claims.CLAIMS[2], claims.CLAIMS[3]
    overall, found = claims.judge(ssim, methods, [])
    # Against the better of the two others: 0.9 - 0.7; runs of other settings are compared among themselves.
    assert overall == "confirmed"
    assert sorted((j.seeds, round(j.mean, 6)) for j in found) == [(2, -0.6), (3, 0.2)]
    overall, (only,) = claims.judge(networks, methods, [])
    assert (overall, only.seeds, round(only.mean, 6)) == ("confirmed", 3, 0.1)
    published = {p.method: claims.ours(p, methods) for p in claims.PUBLISHED}
    assert published == dict.fromkeys(published, "-")  # these runs have no pixel AUROC


def test_accuracies_are_those_of_the_rules_that_the_page_names():
    def shown(experiment, percentile, threshold):
        row = row_of(experiment, "quick", percentile=percentile) | {"threshold": threshold}
        return tuple(page._accuracies({**row, "image_accuracy": 0.7, "image_accuracy_calibrated": 0.8}).values())

    assert shown("autoencoder", 98.0, 0.3) == (0.7, 0.8)
    assert shown("autoencoder", 90.0, 0.3) == (None, None)
    assert shown("segmentation", 90.0, 0.5) == (0.7, None)
    assert shown("segmentation", 98.0, 0.4) == (None, 0.8)


@pytest.mark.slow
def test_the_page_follows_from_the_files_alone(tmp_path):
    runs = [record(seed=s, maps={"ssim": {"pixel_auroc": 0.9 + 0.01 * s, "image_accuracy": 0.5}}) for s in range(3)]
    methods, _ = results.gather([write(tmp_path / "runs", *runs, record(percentile=90.0))])
    studies = study_rows("epochs", {"25": [0.9, 0.91, 0.92], "100": [0.9, 0.91, 0.92]})
    studies += study_rows("loss", {"mse": [0.9, 0.8], "a$b_c": [0.7]})
    out = tmp_path / "page" / "results.md"
    page.write(out, methods, studies)
    page.render(out)
    text = out.read_text()
    assert "| SSIM-AE (wang), SSIM map (thesis) | 0.910 (0.900 to 0.920) | - | 0.500 |" in text
    assert "25 epochs are enough: confirmed" in text
    assert "U-Net localises better than CompactCNN: undecided" in text
    assert "| SSIM-AE | woven fabric | 0.966 |" in text
    assert "0.905 (" not in text
    # The accuracy of another percentile is none by the thesis' rule.
    (other,) = (line for line in text.splitlines() if "0.900 | 0.800 |" in line and "SSIM map" in line)
    assert other.split("|")[4].strip() == "-"
    (tmp_path / "page" / "results" / "study_old.png").write_bytes(b"")

    again = tmp_path / "again"
    shutil.copytree(tmp_path / "page" / "results", again / "results", ignore=shutil.ignore_patterns("*.png"))
    command = [sys.executable, "-m", "experiments.report", f"--out={again / 'results.md'}", "--compilation_cache="]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    page.render(out)

    def tree(root):
        return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}

    assert set(tree(again)) == {
        "results.md",
        *(f"results/{n}" for n in ("methods.csv", "studies.csv", "methods.png")),
        *(f"results/study_segmentation_{n}.png" for n in ("epochs", "loss")),
    }
    assert tree(again) == tree(tmp_path / "page")
    page.write(out, *(json.loads(json.dumps(x)) for x in (methods, studies)))
    assert tree(again) == tree(tmp_path / "page")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"run": "../../elsewhere"}, "lies outside"),
        ({"run": "/etc"}, "lies outside"),
        ({"settings": "{"}, "is damaged"),
        ({"pixel_auroc": "x"}, "is damaged"),
        ({"run": None}, "is damaged"),
        ({"run": "runs/y"}, "no run in"),
    ],
)
def test_a_damaged_study_is_named_and_leads_nowhere_else(tmp_path, change, said):
    files.write_json(tmp_path / "a" / "sweep.json", {})
    files.write_json(tmp_path / "a" / "runs" / "x" / "config.json", settings("autoencoder", "quick"))
    row = {"study": "map", "axis": "residual_constants", "value": "thesis", **results.rows(record())[0]}
    row |= {"map": "ssim", "settings": "{}", "run": "runs/x"}
    files.write_csv(tmp_path / "a" / "results.csv", [row])
    assert len(results.gather([tmp_path])[1]) == 1
    changed = {k: v for k, v in {**row, **change}.items() if (k, v) != ("run", None)}
    files.write_csv(tmp_path / "a" / "results.csv", [changed])
    with pytest.raises(InputError, match=said):
        results.gather([tmp_path])
    files.write_text(tmp_path / "a" / "results.csv", ",".join(row) + "\n1,2\n")
    with pytest.raises(InputError, match="lacks a cell"):
        results.gather([tmp_path])
