"""The results page: what is gathered, that the page follows from the CSV files alone, and how claims are judged."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from configs.autoencoder import PRESETS
from configs.segmentation import PRESETS as SUPERVISED
from configs.spectrum import PRESETS as SPECTRUM
from steel_ad import config as configs
from steel_ad import files
from steel_ad.errors import InputError
from steel_ad.research import claims, results
from steel_ad.research import results_page as page

ROOT = Path(__file__).parent.parent
SETTINGS = {
    "autoencoder": {name: configs.Autoencoder(**p) for name, p in PRESETS.items()},
    "segmentation": {name: configs.Segmentation(**p) for name, p in SUPERVISED.items()},
}
SETTINGS["transfer"] = SETTINGS["segmentation"]
SETTINGS["spectrum"] = {name: configs.Spectrum(**p) for name, p in SPECTRUM.items()}


def record(
    experiment="autoencoder", preset="quick", *, maps=None, dataset="lens", data="/x/lens", extra=None, **settings
):
    config = configs.to_dict(SETTINGS[experiment][preset]) | {"data": data} | settings
    metrics = {
        "pixel_auroc": 0.9,
        "aupro_30": 0.8,
        "image_accuracy": 0.7,
        "defects_found": {"iou_0": 1.0, "iou_30": 0.5},
    }
    return {
        "experiment": experiment,
        "dataset": dataset,
        "config": config,
        "percentile": config["percentile"],
        "maps": maps or {"ssim": metrics, "l2": {**metrics, "pixel_auroc": None}},
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
    rows = [{**r, "seed": "0"} for r in results.rows(record(maps={"ssim": {"pixel_auroc": 0.1 + 0.2}}))]
    files.write_csv(tmp_path / "a.csv", rows)
    back = results.read(tmp_path / "a.csv")
    assert back == rows
    with pytest.raises(InputError, match=r"b\.csv cannot be read"):
        results.read(tmp_path / "b.csv")


def spectral(**settings):
    """What `studies.spectrum` records: costs of each map, none of the training."""
    maps = {"whitening": {"pixel_auroc": 0.86}, "lattice": {"pixel_auroc": 0.94}}
    made = record("spectrum", "default", maps=maps, **settings)
    del made["train_seconds"]
    speeds = {"whitening": 5.0, "lattice": 3.0}
    return made | {"fit_seconds": {"whitening": 1.0, "lattice": 2.0}, "test_megapixels_per_second": speeds}


def test_costs_of_each_map_survive_a_file(tmp_path):
    methods, _ = results.gather([write(tmp_path / "runs", spectral(), spectral(detail=0.0))], SETTINGS)
    files.write_csv(tmp_path / "a.csv", methods)
    found = [r for r in results.read(tmp_path / "a.csv") if r["map"] == "lattice"]
    assert [(r["train_seconds"], r["test_megapixels_per_second"]) for r in found] == [(2.0, 3.0)] * 2
    # Other settings are another command.
    start = "python -m experiments.spectrum --config=configs/spectrum.py:default"
    assert {r["command"] for r in found} == {
        f"{start} --data=lens --workdir=W",
        f"{start} --config.detail=0.0 --data=lens --workdir=W",
    }


def test_the_command_of_settings():
    config = configs.Autoencoder(**{**PRESETS["quick"], "loss": "l2", "seed": 2, "loss_options": {"weight": 0.3}})
    line = results.command(
        "autoencoder", config, SETTINGS["autoencoder"], {"data": "a b", "defects": "", "workdir": "W"}
    )
    assert line == (
        "python -m experiments.autoencoder --config=configs/autoencoder.py:quick --config.seed=2 "
        "--loss_option=weight=0.3 --config.loss=l2 '--data=a b' --workdir=W"
    )
    line = "python -m experiments.sweep --config=c.py:x --data=/q/lens,procedural/diamond --workdir=/tmp/w --workdir V"
    assert results.public(line) == (
        "python -m experiments.sweep --config=c.py:x --data=lens,procedural/diamond --workdir=W --workdir=W"
    )
    for start in ("steel-ad sweep", "python -m steel_ad sweep"):
        assert results.public(f"{start} --data=/q/lens") == f"{start} --data=lens"
        assert results.shared(f"{start} --study=a --config.loss=l2") == f"{start} --config.loss=l2"
    more = (
        "python -m experiments.sweep --data lens --config=c.py:x -seeds=3 --config.seed 2 --study=a,b --config.loss=l2"
    )
    assert results.shared(more) == "python -m experiments.sweep --config.loss=l2 --config=c.py:x"
    assert results.shared(line) == "python -m experiments.sweep --config=c.py:x"


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
    base = configs.to_dict(SETTINGS["autoencoder"]["quick"])
    files.write_json(study / "sweep.json", {"experiment": "autoencoder", **base})
    write(study / "runs" / "lens", record(seed=7), record(latent=32, seed=8))
    files.write_json(study / "runs" / "lens" / "0" / "config.json", {**base, "data": "/x/lens"})
    row = {"study": "map", "axis": "residual_constants", "value": "wang", **results.rows(record(seed=7))[0]}
    row |= {"settings": "{}", "run": "runs/lens/0", "command": "python -m experiments.sweep --data=/x/lens"}
    files.write_csv(study / "results.csv", [row, {**row, "map": "l2"}])

    methods, studies = results.gather([folder, study, folder], SETTINGS)
    found = [(r["method"], r["seed"]) for r in methods]
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
    commands = {r["command"] for r in (*methods, *studies)}
    assert not any("/x" in c or "/d/" in c for c in commands)
    assert ("python -m experiments.spectrum --config=configs/spectrum.py:default --data=lens --workdir=W") in commands
    assert (
        "python -m experiments.segmentation --config=configs/segmentation.py:quick --data=lens --defects=strip-defects "
        "--workdir=W"
    ) in commands


def test_what_cannot_be_gathered(tmp_path):
    with pytest.raises(InputError, match="there is no folder"):
        results.gather([tmp_path / "none"], SETTINGS)
    with pytest.raises(InputError, match="no finished run"):
        results.gather([write(tmp_path / "a", {"something": "else"})], SETTINGS)
    with pytest.raises(InputError, match=r"no record of a run.*lattent"):
        results.gather([write(tmp_path / "b", record(lattent=3))], SETTINGS)
    with pytest.raises(InputError, match=r"there is no .*methods"):
        page.render(tmp_path / "page.md")
    assert not (tmp_path / "page.md").exists()


def study_rows(study, values, *, dataset="lens", name="segmentation", metric="pixel_auroc"):
    """`values`: value of the axis -> numbers of the seeds."""
    head = dict.fromkeys(("axis", *results.ROW, "settings", "run"), None)
    return [
        {**head, "study": study, "axis": study, "value": v, "dataset": dataset, "seed": str(s), "map": name, metric: x}
        | {"command": "c", "experiment": "segmentation"}
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

    # Seeds that were added later came by another command.
    later = [{**r, "command": f"python -m experiments.sweep --seeds={int(r['seed']) + 1}"} for r in rows]
    assert [(j.seeds, j.low) for j in claims.judge(epochs, [], later)[1]] == [(5, found.low)]

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
    methods, _ = results.gather([write(tmp_path, *runs)], SETTINGS)
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
        row = {"image_accuracy": 0.7, "image_accuracy_calibrated": 0.8, "experiment": experiment}
        return tuple(page._accuracies({**row, "percentile": percentile, "threshold": threshold}).values())

    assert shown("autoencoder", "98.0", 0.3) == (0.7, 0.8)
    assert shown("autoencoder", "90.0", 0.3) == (None, None)
    assert shown("segmentation", "90.0", 0.5) == (0.7, None)
    assert shown("segmentation", "98.0", 0.4) == (None, 0.8)


@pytest.mark.slow
def test_the_page_follows_from_the_files_alone(tmp_path):
    runs = [record(seed=s, maps={"ssim": {"pixel_auroc": 0.9 + 0.01 * s, "image_accuracy": 0.5}}) for s in range(3)]
    methods, _ = results.gather([write(tmp_path / "runs", *runs, record(percentile=90.0))], SETTINGS)
    studies = study_rows("epochs", {"25": [0.9, 0.91, 0.92], "100": [0.9, 0.91, 0.92]})
    studies += study_rows("loss", {"mse": [0.9, 0.8], "a$b_c": [0.7]})
    for row in studies:
        row["command"] = f"python -m experiments.sweep --seeds={int(row['seed']) + 1}"
    out = tmp_path / "page" / "results.md"
    page.write(out, methods, studies)
    page.render(out)
    text = out.read_text()
    assert "| SSIM-AE (wang), SSIM map (thesis) | 0.910 (0.900 to 0.920) | - | - | 0.500 |" in text
    assert "25 epochs are enough: confirmed" in text
    assert "U-Net localises better than CompactCNN: undecided" in text
    assert "| SSIM-AE | woven fabric | 0.966 |" in text
    assert "0.905 (" not in text
    # The accuracy of another percentile is none by the thesis' rule.
    (other,) = (line for line in text.splitlines() if "0.900 | 0.800 |" in line and "SSIM map" in line)
    assert other.split("|")[5].strip() == "-"
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
        ({"command": "python 'x"}, "is damaged"),
        ({"pixel_auroc": "x"}, "cannot be read"),
        ({"run": None}, "cannot be read"),
    ],
)
def test_a_damaged_study_is_named_and_leads_nowhere_else(tmp_path, change, said):
    files.write_json(tmp_path / "a" / "sweep.json", {})
    files.write_json(tmp_path / "a" / "runs" / "x" / "config.json", configs.to_dict(SETTINGS["autoencoder"]["quick"]))
    row = {"study": "map", "axis": "residual_constants", "value": "thesis", **results.rows(record())[0]}
    row |= {"map": "ssim", "settings": "{}", "run": "runs/x", "command": "python -m experiments.sweep"}
    files.write_csv(tmp_path / "a" / "results.csv", [row])
    assert len(results.gather([tmp_path], SETTINGS)[1]) == 1
    changed = {k: v for k, v in {**row, **change}.items() if (k, v) != ("run", None)}
    files.write_csv(tmp_path / "a" / "results.csv", [changed])
    with pytest.raises(InputError, match=said):
        results.gather([tmp_path], SETTINGS)
    files.write_text(tmp_path / "a" / "results.csv", ",".join(row) + "\n1,2\n")
    with pytest.raises(InputError, match="lacks a cell"):
        results.gather([tmp_path], SETTINGS)
