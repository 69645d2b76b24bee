"""Objectives, first states and maps of the trained detectors, against what they are made of."""

import csv
import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import ndimage

from steel_ad import config as configs
from steel_ad import files, metrics
from steel_ad.data import datasets, patches
from steel_ad.data import plates as drawn
from steel_ad.data.images import Images
from steel_ad.detectors import Detector, autoencoder, phase_only, segmentation
from steel_ad.errors import InputError
from steel_ad.models import compact_cnn, unet
from steel_ad.ops import sliding
from steel_ad.ops.ssim import CONSTANTS, ssim_map
from steel_ad.report import evaluation as figures
from steel_ad.research import false_alarms
from steel_ad.runs import evaluation
from steel_ad.train.state import create, stream

ROOT = jax.random.key(3)
STEP = jnp.int32(5)


@pytest.fixture(scope="module")
def plates():
    rng = np.random.default_rng(0)
    return jax.tree.map(jnp.asarray, patches.stack(list(rng.integers(0, 256, (3, 40, 48), np.uint8))))


def autoencoder_settings(**settings):
    from configs.autoencoder import PRESETS

    return configs.Autoencoder(**{**PRESETS["tiny"], **settings})


def segmentation_settings(**settings):
    from configs.segmentation import PRESETS

    return configs.Segmentation(**{**PRESETS["tiny"], **settings})


def test_the_autoencoders_objective_is_the_mean_loss_of_its_patches(plates):
    config = autoencoder_settings(constants="thesis")
    state = autoencoder.initial_state(config, ROOT)
    loss, (extra, metrics) = jax.jit(autoencoder.objective(config))(
        state.params, {"kept": 1}, autoencoder.Good(plates), STEP, ROOT
    )
    crops = patches.random_crops(stream(ROOT, "crops", STEP), plates.sizes, num=4, patch_size=32)
    x = patches.random_flips(stream(ROOT, "flips", STEP), patches.cut(plates, crops, patch_size=32))
    y = jax.jit(autoencoder.model(config).apply)(state.params, x)
    c1, c2 = CONSTANTS["thesis"]
    of_each = [1 - np.mean(ssim_map(a[..., 0], b[..., 0], c1=c1, c2=c2)) for a, b in zip(y, x, strict=True)]
    np.testing.assert_allclose(loss, np.mean(of_each), rtol=1e-4)
    contrast = np.std(y, axis=(1, 2, 3)).mean() / np.std(x, axis=(1, 2, 3)).mean()
    np.testing.assert_allclose(metrics["contrast"], contrast, rtol=1e-3)
    assert extra == {"kept": 1}


# The suite compiles without optimising, the program of a first state with a little of it, which users' programs share to the bit.
same_numbers = (
    np.testing.assert_array_equal
    if "STEEL_AD_OPTIMISED" in os.environ
    else functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
)


def test_the_autoencoders_first_state_is_that_of_its_network_and_seed():
    config = autoencoder_settings(latent=7, dtype="bfloat16")
    network = autoencoder.model(config)
    assert (network.latent, network.dtype) == (7, jnp.bfloat16)
    state = autoencoder.initial_state(config, ROOT)
    want = jax.jit(network.init)(stream(ROOT, "init"), jnp.zeros((1, 32, 32, 1)))
    jax.tree.map(same_numbers, state.params, want)
    assert int(state.step) == 0
    assert state.params["params"]["Collapse_0"]["kernel"].shape == (2, 2, 32, 7)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.03)])
def test_a_reconstruction_is_the_mean_of_the_networks_windows(dtype, tolerance):
    """Though overlapping windows share their first layers; with biases, which the zeros around a window do not have."""
    config = autoencoder_settings(dtype=dtype, stride=8)
    params = jax.tree.map(lambda p: p + 0.1 if p.ndim == 1 else p, autoencoder.initial_state(config, ROOT).params)
    image = jax.random.uniform(ROOT, (48, 64))
    tiles = sliding.windows(image, size=32, stride=8)
    whole = jax.jit(autoencoder.model(config).apply)(params, tiles[..., None])[..., 0]
    found = jax.jit(functools.partial(autoencoder.reconstruct, config))(params, image)
    want = sliding.average(whole, shape=image.shape, stride=8)
    assert float(want.std()) > 100 * tolerance or dtype == "bfloat16"
    np.testing.assert_allclose(found, want, atol=tolerance)


def test_constants_of_the_loss_follow_the_settings_unless_they_are_given():
    x, y = jax.random.uniform(ROOT, (2, 1, 16, 16, 1))
    for settings, c1, c2 in (
        ({"constants": "wang"}, *CONSTANTS["wang"]),
        ({"constants": "thesis"}, *CONSTANTS["thesis"]),
        ({"constants": "wang", "loss_options": {"c2": 0.5}}, CONSTANTS["wang"][0], 0.5),
    ):
        found = autoencoder.loss_function(autoencoder_settings(**settings))(x, y)
        want = 1 - np.mean(ssim_map(x[0, ..., 0], y[0, ..., 0], c1=c1, c2=c2))
        np.testing.assert_allclose(found, [want], rtol=1e-5)


@pytest.mark.parametrize(("name", "kind"), [("unet", unet.UNet), ("compact_cnn", compact_cnn.Segmenter)])
def test_the_settings_name_the_network(name, kind):
    network = segmentation.network(segmentation_settings(model=name, dtype="bfloat16"))
    assert type(network) is kind
    assert network.dtype == jnp.bfloat16


@pytest.fixture(scope="module")
def supervised(plates):
    """Settings, samples of a batch, and both stages before their first step."""
    config = segmentation_settings(loss="bce", ratio="1:1", classifier_ratio="3:1", batch_size=6)
    marks = np.tile(np.array([[[20, 20]]], np.int32), (3, 4, 1))
    masks = patches.stack([np.eye(40, 48, dtype=np.uint8)] * 3)
    labelled = {"labelled": plates, "masks": jax.tree.map(jnp.asarray, masks), "marks": jnp.asarray(marks)}
    samples = segmentation.Samples(plates, **labelled)
    first = segmentation.initial_segmentation(config, 4)
    second = segmentation.initial_classifier(config, segmentation.variables(first))
    return config, samples, first, second


def test_first_states_of_both_stages_are_those_of_their_networks_and_seed(supervised):
    config, _, first, second = supervised
    network, root = segmentation.network(config), jax.random.key(config.seed)
    x = jnp.zeros((1, config.patch_size, config.patch_size, 1))
    want = jax.jit(network.init)(stream(root, "init segmentation"), x)
    frozen = segmentation.variables(first)
    assert set(frozen) == {"params", "batch_stats"}
    jax.tree.map(same_numbers, frozen, dict(want))

    @jax.jit
    def init(key, frozen):
        return compact_cnn.Classifier().init(key, *network.apply(frozen, x))

    want = init(stream(root, "init classifier"), frozen)
    jax.tree.map(same_numbers, segmentation.variables(second), dict(want))
    assert int(first.step) == int(second.step) == 0


@pytest.mark.slow
def test_objectives_of_both_stages_are_the_means_over_their_samples(supervised):
    config, samples, first, second = supervised
    network, frozen = segmentation.network(config), segmentation.variables(first)

    @jax.jit
    def expected(frozen, params, extra):
        found = []
        for share in (0.5, 0.75):
            batch = segmentation.draw(config, share, samples, STEP, ROOT)
            found.append((batch, network.apply(frozen, batch.image, train=True, mutable=["batch_stats"])[0][1]))
        features, logits = network.apply(frozen, found[1][0].image)
        variables = {"params": params, **extra}
        logit = compact_cnn.Classifier().apply(
            variables, features, jax.nn.sigmoid(logits), train=True, mutable=["batch_stats"]
        )[0]
        return found[0], found[1][0].label, logit

    (batch, logits), label, logit = jax.device_get(expected(frozen, second.params, second.extra))

    def cross_entropy(logit, truth):
        logit = np.asarray(logit, np.float64)
        return np.mean(np.logaddexp(0, logit) - truth * logit)

    objective = jax.jit(segmentation.segmentation_objective(config))
    loss, (extra, _) = objective(first.params, first.extra, samples, STEP, ROOT)
    np.testing.assert_allclose(loss, cross_entropy(logits, batch.mask), rtol=1e-5)
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (extra, first.extra)), strict=True))
    objective = jax.jit(segmentation.classifier_objective(config))
    loss, (_, metrics) = objective(second.params, second.extra, samples._replace(frozen=frozen), STEP, ROOT)
    np.testing.assert_allclose(loss, cross_entropy(logit, label), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], np.mean((logit > 0) == (label > 0.5)))
    assert 0 < label.mean() < 1


def test_maps_and_probabilities_of_images_whose_sides_are_no_multiples(supervised):
    config, _, first, second = supervised
    frozen, classifier = segmentation.variables(first), segmentation.variables(second)
    image = jax.random.uniform(ROOT, (37, 50))
    padded = jnp.asarray(np.pad(image, ((0, 11), (0, 14)), mode="reflect"))[None, :, :, None]
    network = segmentation.network(config)
    features, logits = jax.jit(network.apply)(frozen, padded)
    found = jax.jit(segmentation.SegmentationDetector(config).residual)({"segmenter": frozen}, image)
    assert found.shape == (37, 50)
    np.testing.assert_allclose(found, jax.nn.sigmoid(logits)[0, :37, :50, 0], atol=1e-6)
    logit = jax.jit(compact_cnn.Classifier().apply)(classifier, features, jax.nn.sigmoid(logits))
    stages = {"segmenter": frozen, "classifier": classifier}
    probability = jax.jit(segmentation.SegmentationDetector(config).probability)(stages, image)
    np.testing.assert_allclose(probability, jax.nn.sigmoid(logit)[0], atol=1e-6)


def test_a_map_of_a_quarter_of_the_size_is_enlarged():
    config = segmentation_settings(model="compact_cnn", loss="bce")
    frozen = segmentation.variables(segmentation.initial_segmentation(config, 4))
    image = jax.random.uniform(ROOT, (32, 48))
    _, logits = jax.jit(segmentation.network(config).apply)(frozen, image[None, :, :, None])
    found = jax.jit(segmentation.SegmentationDetector(config).residual)({"segmenter": frozen}, image)
    want = jax.image.resize(jax.nn.sigmoid(logits)[0, :, :, 0], (32, 48), "bilinear")
    np.testing.assert_allclose(found, want, atol=1e-6)


def test_reconstructions_are_those_of_windows_averaged_and_compared():
    config = autoencoder_settings()
    params = autoencoder.initial_state(config, ROOT).params
    image = jax.random.uniform(ROOT, (40, 48))
    apply = jax.jit(autoencoder.model(config).apply)
    total, count = np.zeros((40, 48)), np.zeros((40, 48))
    for top in (0, 8):
        for left in (0, 16):
            window = image[None, top : top + 32, left : left + 32, None]
            total[top : top + 32, left : left + 32] += apply(params, window)[0, :, :, 0]
            count[top : top + 32, left : left + 32] += 1
    found = jax.jit(lambda image: autoencoder.reconstruct(config, params, image))(image)
    np.testing.assert_allclose(found, total / count, atol=1e-6)
    for name in ("l2", "ssim"):
        detector = autoencoder.AutoencoderDetector(config).only(name)
        want = detector.compare(found, image)[name]
        np.testing.assert_allclose(jax.jit(detector.residual)(params, image), want, atol=1e-5)
        assert want.shape == image.shape
    np.testing.assert_allclose(
        autoencoder.AutoencoderDetector(config).only("l2").compare(found, image)["l2"], np.abs(found - image)
    )


@pytest.mark.slow
def test_fitting_trains_with_the_settings_seed(plates):
    config = autoencoder_settings(steps=2, checkpoint_every=2)
    images = list(np.random.default_rng(0).integers(0, 256, (3, 40, 48), np.uint8))
    found = autoencoder.AutoencoderDetector(config).fit(images)
    jax.tree.map(np.testing.assert_array_equal, found, autoencoder.train(config, jax.device_get(plates)).params)
    before = autoencoder.initial_state(config, jax.random.key(config.seed)).params
    assert all(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (found, before)), strict=True))


def test_phase_only_has_nothing_to_fit():
    assert phase_only.PhaseOnlyDetector().fit([np.zeros((16, 16), np.uint8)]) == {}


def test_rows_of_scores_tell_what_each_image_is_and_what_each_map_says_of_it():
    low, high = np.zeros((2, 2), np.float32), np.array([[0, 0], [0, 0.5]], np.float32)
    maps = {"a": evaluation.Maps([low, high, low], [low, high, low])}
    maps["b"] = evaluation.Maps([low, low, low], [high, low, low])
    marked = np.array([[False, False], [False, True]])
    test = [
        datasets.TestImage("x", "good", low.astype(np.uint8), ~marked & marked),
        datasets.TestImage("y", "dent", low.astype(np.uint8), marked),
        datasets.TestImage("z", "crack", low.astype(np.uint8), ~marked & marked),  # where it is has not been marked
    ]
    limits = {"a": evaluation.Thresholds(0.5, 0.4), "b": evaluation.Thresholds(0.4, 0.6)}
    contrasts = np.array([np.nan, 2.5, np.nan])
    assert evaluation.score_rows(maps, test, limits, {"p": np.array([0.25, 0.75, 0.5])}, contrasts) == [
        {"image": "x", "kind": "good", "defective": 0, "contrast_to_noise": None}
        | {"score_a": 0.0, "defect_a": 0, "score_b": 0.5, "defect_b": 1, "score_p": 0.25},
        {"image": "y", "kind": "dent", "defective": 1, "contrast_to_noise": 2.5}
        | {"score_a": 0.5, "defect_a": 0, "score_b": 0.0, "defect_b": 0, "score_p": 0.75},
        {"image": "z", "kind": "crack", "defective": 1, "contrast_to_noise": None}
        | {"score_a": 0.0, "defect_a": 0, "score_b": 0.0, "defect_b": 0, "score_p": 0.5},
    ]
    found = evaluation.measure(maps["a"], test, limits["a"])
    assert [t.defective for t in test] == [False, True, True]
    want = metrics.evaluate(
        *(maps["a"].raw, maps["a"].opened, [t.mask for t in test], [0, 1, 1]), threshold=0.5, image_threshold=0.4
    )
    np.testing.assert_equal(found, want)
    assert found["pixel_auroc"] == 1.0


class Brightness(Detector):
    """Two maps, the image brighter by its state and the image."""

    name = "b"

    def fit(self, images):
        return {"factor": np.float32(2)}

    def residual(self, state, image):
        return image

    names = ("b", "a")

    def maps(self, state, image):
        return {"b": image * state["factor"], "a": image}


def test_maps_and_their_openings_come_in_the_order_of_images_of_any_shape():
    rng, cross = np.random.default_rng(5), ndimage.generate_binary_structure(2, 1)
    images = [np.pad(rng.integers(0, 256, shape, np.uint8), 2) for shape in ((6, 9), (8, 5), (6, 9), (6, 9))]
    found, probabilities = evaluation.Mapper(Brightness(), 1)(Brightness().fit(images), images, label="maps")
    assert probabilities is None
    assert list(found) == ["b", "a"]
    for name, factor in (("a", 1 / 255), ("b", 2 / 255)):
        for raw, opened, image in zip(found[name].raw, found[name].opened, images, strict=True):
            np.testing.assert_allclose(raw, factor * image, rtol=1e-6)
            np.testing.assert_allclose(opened, factor * ndimage.grey_opening(image, footprint=cross), rtol=1e-6)


def test_a_report_holds_what_was_measured_and_nothing_of_the_one_before(tmp_path, monkeypatch):
    # Of 4x4 pixels no defect has surroundings, and three good images tell no false alarms of 5 %.
    bright, dark = np.eye(4, dtype=np.float32), np.zeros((4, 4), np.float32)
    grey, marked = np.full((4, 4), 9, np.uint8), np.eye(4) > 0
    # Scores of good images 0.1, 0.3 and 0.2, of dents 1 and 2.
    maps = [dark + 0.1, 2 * bright, dark + 0.3, bright, dark + 0.2]
    kinds = ["good", "dent", "good", "dent", "good"]
    test = [datasets.TestImage(f"{k}/{i}", k, grey + i, marked & (k != "good")) for i, k in enumerate(kinds)]
    limits, drawn_, met = {"m": evaluation.Thresholds(0.25, 0.5)}, {}, []
    monkeypatch.setattr(evaluation.parallel, "barrier", met.append)
    for name in ("examples", "score_histogram", "curves"):
        monkeypatch.setattr(figures, name, lambda path, *a, name=name, **how: drawn_.update({name: (path, a, how)}))
    stale = [tmp_path / "figures" / name for name in ("examples_old.png", "scores_old.png", "training.png")]
    stale[0].parent.mkdir()
    for path in (*stale, tmp_path / "metrics.json"):
        path.write_text("{}")
    told = {"limits": limits, "record": {"dataset": "line"}, "extra_maps": {"c": {"image_f1": 0.5}}}
    told |= {"extra_scores": {"p": np.arange(5)}, "reconstruct": lambda image: image / 2}
    found = evaluation.report(tmp_path, {"m": evaluation.Maps(maps, maps)}, test, **told)
    assert [path.exists() for path in stale] == [False, False, True]
    assert found["maps"]["m"]["pixel_auroc"] == 1.0
    assert found["maps"]["c"] == {"image_f1": 0.5}
    assert found["thresholds"] == {"m": {"pixel": 0.25, "image": 0.5}}
    # What so few images leave undefined is null in the file.
    known = {k: None if v != v else v for k, v in found["maps"]["m"].items()}
    known["found_by_contrast"] = {key: {"images": 0, "found": None} for key in known["found_by_contrast"]}
    assert files.read_json(tmp_path / "metrics.json") == {**found, "maps": {**found["maps"], "m": known}}
    rows = (tmp_path / "scores.csv").read_text().splitlines()
    assert rows[0] == "image,kind,defective,contrast_to_noise,score_m,defect_m,score_p"
    assert [row.split(",")[5] for row in rows[1:]] == ["0", "1", "1", "1", "0"]

    path, (good, bad), how = drawn_["score_histogram"]
    assert path == tmp_path / "figures" / "scores_m.png"
    np.testing.assert_allclose(good, [0.1, 0.3, 0.2], rtol=1e-6)
    assert {kind: scores.tolist() for kind, scores in bad.items()} == {"dent": [2, 1]}
    assert (how["threshold"], how["calibrated"]) == (0.25, 0.5)
    # The good image in the middle and the worst one; of two dents the stronger.
    _, (examples,), how = drawn_["examples"]
    assert [row.name for row in examples] == ["4", "2", "1"]
    assert [row.mask.any() for row in examples] == [False, True, True]
    np.testing.assert_array_equal(examples[0].reconstruction, np.full((4, 4), 6.5))
    assert how["threshold"] == 0.25
    _, (series,), _ = drawn_["curves"]
    assert (list(series), series["m"]["auroc"], series["m"]["tpr"][-1]) == (["m"], 1.0, 1.0)

    drawn_.clear()
    # Good pixels of a single image are enough for a curve.
    full = datasets.TestImage(test[1].name, test[1].kind, test[1].image, marked | True)
    evaluation.report(tmp_path / "bad", {"m": evaluation.Maps(maps[1:4:2], maps[1:4:2])}, [full, test[3]], **told)
    assert set(drawn_) == {"examples", "score_histogram", "curves"}
    drawn_.clear()
    # Without a marked pixel there is no curve, without an image nothing.
    evaluation.report(tmp_path, {"m": evaluation.Maps(maps[::2], maps[::2])}, test[::2], **told | {"extra_scores": {}})
    assert set(drawn_) == {"examples", "score_histogram"}
    drawn_.clear()
    alone = evaluation.report(tmp_path, {"m": evaluation.Maps([], [])}, [], limits=limits, record={"dataset": "line"})
    assert (alone["maps"], alone["thresholds"], drawn_) == ({}, found["thresholds"], {})
    monkeypatch.setattr(evaluation.parallel, "is_main", lambda: False)
    assert evaluation.report(tmp_path, {"m": evaluation.Maps(maps, maps)}, test, **told) == alone
    assert not drawn_
    assert met == ["report"] * 5


def test_a_report_tells_what_is_found_by_how_visible_it_is(tmp_path, monkeypatch):
    rng, drawn_ = np.random.default_rng(0), {}
    for name in ("examples", "score_histogram", "curves"):
        monkeypatch.setattr(figures, name, lambda *a, **how: None)
    monkeypatch.setattr(figures, "found_by_contrast", lambda path, bins, title: drawn_.update({path: (bins, title)}))
    mask = np.zeros((60, 60), bool)
    mask[25:35, 25:35] = True
    noise = rng.normal(100, 5, (26, 60, 60))
    # Means of 100 pixels vary by 0.5: a hidden defect, one of about 4 and one of about 20.
    noise[20:] += mask * np.array([0, 0, 2, 2, 10, 10])[:, None, None]
    kinds = ["good"] * 20 + ["dent"] * 6
    test = [
        datasets.TestImage(f"{k}/{i}", k, np.clip(np.round(plate), 0, 255).astype(np.uint8), mask & (k != "good"))
        for i, (k, plate) in enumerate(zip(kinds, noise, strict=True))
    ]
    # At 5 % one good image may be above: the limit is 18, and of the six defective images four are found.
    maps = [np.full((60, 60), s, np.float32) for s in [*range(20), 3, 18, 18.5, 30, 30, 30]]
    told = {"limits": {"m": evaluation.Thresholds(0.25, 0.5)}, "record": {"dataset": "line"}}
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "contrast.png").touch()
    found = evaluation.report(tmp_path, {"m": evaluation.Maps(maps, maps)}, test, **told)
    bins = found["maps"]["m"]["found_by_contrast"]
    assert list(bins) == ["<1", "1-2", "2-3", "3-5", ">5"]
    assert sum(b["images"] for b in bins.values()) == 6
    assert bins[">5"] == {"images": 2, "found": 1.0}
    assert (bins["2-3"]["images"] + bins["3-5"]["images"], bins["<1"]["images"] + bins["1-2"]["images"]) == (2, 2)
    assert sum(b["images"] * b["found"] for b in bins.values() if b["images"]) == 4
    assert drawn_ == {tmp_path / "figures" / "contrast.png": ({"m": bins}, "line")}
    assert not (tmp_path / "figures" / "contrast.png").exists()
    with (tmp_path / "scores.csv").open() as file:
        cells = [row["contrast_to_noise"] for row in csv.DictReader(file)]
    assert cells[:20] == [""] * 20
    assert min(float(c) for c in cells[24:]) > 5


def test_lines_vary_about_their_pattern():
    for number, pattern in enumerate(("teardrop1", "teardrop2", "diamond", "teardrop1")):
        base, own = false_alarms.line(np.random.default_rng(number), number, 128)
        assert base.pitch_px == pytest.approx(128 / 4.2)
        assert own["pitch_px"] / base.pitch_px == pytest.approx(1, abs=0.025)
        assert abs(own["angle_deg"] - base.angle_deg) <= 1
        ratio = own["lug_length_px"] / own["pitch_px"]
        assert ratio == pytest.approx(drawn.LINES[pattern].lug_length_px / drawn.LINES[pattern].pitch_px)
        assert 0.03 <= own["grain"] <= 0.06


def test_a_line_is_divided_with_the_use_of_each_image():
    images = [np.full((8, 8), i, np.uint8) for i in range(9)]
    dataset = datasets.Dataset("x", Images(images), [{"file": i} for i in range(9)], [])
    line = datasets.divided(dataset, 0.3, 5, 4)
    train, validation = datasets.split(9, 0.3, 5)
    train = datasets.chosen(train, 4, 5)
    assert line.dataset is dataset
    assert [int(i[0, 0]) for i in line.training] == train.tolist()
    assert [int(i[0, 0]) for i in line.validation] == validation.tolist()
    assert [row["file"] for row in line.manifest] == list(range(9))
    use = np.array([row["use"] for row in line.manifest])
    for name, indices in (("train", train), ("validation", validation)):
        np.testing.assert_array_equal(np.flatnonzero(use == name), indices)
    assert (use == "none").sum() == 9 - 4 - 3
    assert len(datasets.divided(dataset, 0.3, 5).training) == 6


def test_steps_follow_the_epochs_unless_they_are_given():
    config = segmentation_settings(samples=30, batch_size=4, steps=0, classifier_steps=0, adapt_steps=0)
    config = dataclasses.replace(config, epochs=2, classifier_epochs=3, adapt_epochs=5)
    assert (config.total_steps, config.total_classifier_steps, config.total_adapt_steps) == (14, 21, 35)
    config = dataclasses.replace(config, steps=9, classifier_steps=8, adapt_steps=6)
    assert (config.total_steps, config.total_classifier_steps, config.total_adapt_steps) == (9, 8, 6)


def stage_of(objective, rule, steps, **settings):
    """A stage of that objective and rule."""
    stage = segmentation.stage(segmentation_settings(**settings), steps)
    return dataclasses.replace(stage, objective=objective, optimizer=rule)


@pytest.mark.parametrize("factor", [None, 3.0])
def test_a_stage_trains_to_its_steps_from_its_own_random_numbers_and_saves_at_its_cadence(factor):
    plates = patches.stack([np.full((8, 8), 51, np.uint8)])
    data = segmentation.Samples(plates, frozen=factor)

    def objective(params, extra, data, step, root):
        draw = jax.random.uniform(stream(root, "draw", step))
        grey = data.good.pixels.astype(jnp.float32).mean()
        return (1.0 if data.frozen is None else data.frozen) * params * grey, (extra, {"draw": draw})

    rule = optax.sgd(0.5)
    begun = dataclasses.replace(create(jnp.asarray(0.0), rule), step=jnp.asarray(1, jnp.int32))
    rows, kept, watched = [], [], []

    def watch(history):
        watched.extend(history)
        return lambda step, row: watched.append({"step": step, **row})

    stage = stage_of(objective, rule, 5, checkpoint_every=2, batch_size=4)
    state = segmentation.train(
        dataclasses.replace(stage, watch=watch),
        data,
        begun,
        seed=5,
        name="a stage",
        history=[{"step": 1}],
        on_step=lambda step, row: rows.append((step, row)),
        save=lambda step, state: kept.append((step, float(state.params))),
    )
    assert int(state.step) == 5
    slope = -0.5 * 51 * (factor or 1)
    assert kept == [(2, slope), (4, 3 * slope), (5, 4 * slope)]
    assert [step for step, _ in rows] == [2, 3, 4, 5]
    assert all(type(value) is float for _, row in rows for value in row.values())
    assert watched == [{"step": 1}, *({"step": step, **row} for step, row in rows)]
    root = stream(jax.random.key(5), "a stage")
    draws = [float(jax.random.uniform(stream(root, "draw", step))) for step in range(1, 5)]
    assert [row["draw"] for _, row in rows] == draws
    # Nobody need listen.
    stage = stage_of(objective, rule, 6, checkpoint_every=2, batch_size=4)
    alone = segmentation.train(stage, data, state, seed=5, name="a stage")
    assert float(alone.params) == 5 * slope


def test_a_stage_refuses_a_batch_that_its_devices_do_not_divide():
    class Three:
        size = 3

    stage = stage_of(None, None, 1, batch_size=4)
    with pytest.raises(InputError, match=r"a batch of 4 cannot be divided among 3 devices.*batch_size=3 or 6"):
        segmentation.train(stage, segmentation.Samples(None), None, seed=0, name="a", mesh=Three())
