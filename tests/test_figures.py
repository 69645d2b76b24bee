import html.parser
import itertools
import resource
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from steel_ad.errors import InputError
from steel_ad.report import coils, detectability, evaluation, making, spectra, studies, style, training
from steel_ad.report import inspection_page as page


def figure_of(function, *arguments, **options):
    """What a function draws, in place of the file it writes."""
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(style, "save", lambda figure, path: kept.append((figure, path)) or "saved")
        assert function("a.png", *arguments, **options) == "saved"
    ((figure, path),) = kept
    assert path == "a.png"
    return figure


def test_threads_draw_one_after_the_other(monkeypatch, tmp_path):
    save, under_way, most = Figure.savefig, [], []

    def watched(figure, *arguments, **options):
        under_way.append(threading.get_ident())
        most.append(len(under_way))
        time.sleep(0.01)
        save(figure, *arguments, **options)
        under_way.pop()

    monkeypatch.setattr(Figure, "savefig", watched)
    series = {("a", "ssim"): {"1": {"m": [0.25]}, "2": {"m": [0.5]}}}
    shown = {"values": ["1", "2"], "metrics": {"m": "metric"}, "axis": "latent"}
    with ThreadPoolExecutor(4) as pool:
        drawn = [pool.submit(studies.study, tmp_path / f"{i}.png", series, title="t", **shown) for i in range(8)]
    assert len({d.result().read_bytes() for d in drawn}) == 1
    assert most == [1] * 8


def disk(shape, row, column, radius):
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    return (rows - row) ** 2 + (columns - column) ** 2 <= radius**2


def plate(seed=0, shape=(64, 64)):
    return np.random.default_rng(seed).integers(60, 200, shape, dtype=np.uint8)


def example(seed=0, shape=(64, 64), **changes):
    truth = disk(shape, 20, 30, 6)
    image = plate(seed, shape)
    fields = {
        "name": f"{seed:03d}.png",
        "kind": "scratch",
        "image": image,
        "truth": truth,
        "reconstruction": image / np.float32(255),
        "residual": truth * 0.5 + np.random.default_rng(seed).random(shape) * 0.1,
        "mask": disk(shape, 20, 33, 6),
        "score": 0.5,
    }
    return evaluation.Example(**(fields | changes))


def build_examples(rows, threshold=0.3):
    return figure_of(evaluation.examples, rows, title="Examples", threshold=threshold)


def build_histogram(good, defective, threshold=0.5, calibrated=None):
    kinds = defective if isinstance(defective, dict) else {"defective": defective}
    return figure_of(evaluation.score_histogram, good, kinds, threshold=threshold, calibrated=calibrated, title="t")


def panels(figure, rows, columns):
    """The panels in reading order; colour bars come after them."""
    return np.array(figure.axes[: rows * columns], dtype=object).reshape(rows, columns)


def outlines(axes, colour):
    """The contour lines of one colour, as a list of [n, 2] arrays of x and y."""
    return [
        path.vertices
        for collection in axes.collections
        if len(collection.get_edgecolor()) and tuple(collection.get_edgecolor()[0]) == to_rgba(colour)
        for path in collection.get_paths()
    ]


def overlapping(figure):
    """Pairs of texts that cover each other, ticks aside."""
    figure.draw_without_rendering()
    texts = list(figure.texts)
    for axes in figure.axes:
        texts += [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
    for legend in [*figure.legends, *(axes.get_legend() for axes in figure.axes)]:
        texts += legend.get_texts() if legend else []
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
    return [(a, b) for (a, box), (b, other) in itertools.combinations(boxes, 2) if box.overlaps(other)]


# Training curve


def test_training_curve_draws_what_was_logged_and_a_mean_that_keeps_its_ends():
    step, loss = np.arange(500) * 10, np.full(500, 0.25)
    axes = figure_of(training.training_curve, {"step": step, "loss": loss}, title="t").axes[0]
    raw, smooth = axes.lines
    np.testing.assert_array_equal(raw.get_xydata(), np.c_[step, loss])
    np.testing.assert_allclose(smooth.get_xydata(), np.c_[step, loss])
    assert raw.get_alpha() < 1


def test_training_curve_mean_is_centred():
    loss = np.linspace(1, 2, 500)
    smooth = figure_of(training.training_curve, {"step": np.arange(500), "loss": loss}, title="t").axes[0].lines[1]
    np.testing.assert_allclose(smooth.get_ydata()[5:-5], loss[5:-5])
    assert smooth.get_label() == "training, mean of 11"


def test_training_curve_puts_validation_at_its_own_steps_and_the_rate_below():
    history = {
        "step": np.arange(30),
        "loss": np.full(30, 0.2),
        "validation_step": [0, 29],
        "validation_loss": [0.3, 0.25],
        "learning_rate": np.linspace(2e-4, 0, 30),
    }
    loss, rate = figure_of(training.training_curve, history, title="t").axes
    np.testing.assert_array_equal(loss.lines[-1].get_xydata(), [[0, 0.3], [29, 0.25]])
    assert [line.get_label() for line in loss.lines] == ["training, as logged", "validation"]
    np.testing.assert_array_equal(rate.lines[0].get_ydata(), history["learning_rate"])
    assert (rate.get_xlabel(), rate.get_ylabel(), loss.get_ylabel()) == ("step", "learning rate", "loss")


@pytest.mark.parametrize(
    ("loss", "scale"), [([1.0, 0.5], "linear"), ([1.0, 0.05], "log"), ([1.0, 0.0], "linear"), ([0.3], "linear")]
)
def test_training_curve_is_logarithmic_where_the_loss_falls_tenfold(tmp_path, loss, scale):
    history = {"step": np.arange(len(loss)), "loss": loss}
    assert figure_of(training.training_curve, history, title="t").axes[0].get_yscale() == scale
    training.training_curve(tmp_path / "a.png", history, title="t")


# Examples


def test_examples_share_one_residual_scale_that_holds_the_threshold():
    rows = [example(0), example(1, residual=np.full((64, 64), 0.05))]
    grid = panels(build_examples(rows, threshold=0.9), 2, 4)
    first, second = (grid[i, 2].images[0] for i in range(2))
    np.testing.assert_array_equal(second.get_array(), rows[1].residual)
    assert first.get_clim() == second.get_clim() == (rows[0].residual.min(), 0.9)
    assert first.get_cmap().name == "viridis"


def test_examples_scale_is_not_set_by_one_bright_pixel():
    residual = np.full((64, 64), 0.1)
    residual[:32] = 0.0
    residual[0, 0] = 50.0
    assert panels(build_examples([example(residual=residual)], threshold=0.05), 1, 4)[0, 2].images[0].get_clim() == (
        0,
        0.1,
    )


def test_examples_leave_out_a_column_only_where_no_row_has_it():
    bare = example(1, reconstruction=None)
    assert [a.texts[0].get_text() for a in panels(build_examples([bare, bare]), 2, 3)[0]] == [
        "image",
        "residual",
        "prediction",
    ]
    grid = panels(build_examples([example(0), bare]), 2, 4)
    assert grid[0, 1].images
    assert not grid[1, 1].images
    assert not grid[1, 1].axison


def test_examples_draw_uint8_and_float_on_one_grey_scale():
    image, reconstruction = (a.images[0] for a in panels(build_examples([example()]), 1, 4)[0, :2])
    np.testing.assert_allclose(image.get_array(), reconstruction.get_array(), rtol=1e-6)
    assert image.get_clim() == reconstruction.get_clim()


@pytest.mark.parametrize(("score", "verdict"), [(0.301, "0.301  DEFECT"), (0.3, "0.3  OK"), (0.0, "0  OK")])
def test_examples_call_a_defect_what_is_above_the_threshold(score, verdict):
    assert panels(build_examples([example(score=score)]), 1, 4)[0, 2].get_title() == verdict


def test_examples_outline_truth_and_prediction_each_in_its_colour():
    row = example()
    image, _, _, prediction = panels(build_examples([row]), 1, 4)[0]
    for axes, colour, mask in [
        (image, style.TRUTH, row.truth),
        (prediction, style.TRUTH, row.truth),
        (prediction, style.PREDICTION, row.mask),
    ]:
        (line,) = outlines(axes, colour)
        rows, columns = np.nonzero(mask)
        np.testing.assert_array_equal(line.min(0), [columns.min() - 0.5, rows.min() - 0.5])
        np.testing.assert_array_equal(line.max(0), [columns.max() + 0.5, rows.max() + 0.5])
    assert not outlines(image, style.PREDICTION)
    assert image.get_xlim() == (-0.5, 63.5)


@pytest.mark.parametrize("mask", [np.ones((64, 64), bool), disk((64, 64), 0, 0, 9)], ids=["all", "corner"])
def test_an_outline_closes_at_the_edge_of_the_image(mask):
    (line,) = outlines(panels(build_examples([example(truth=mask)]), 1, 4)[0, 0], style.TRUTH)
    np.testing.assert_array_equal(line[0], line[-1])
    np.testing.assert_array_equal(line.min(0), [-0.5, -0.5])


def test_examples_of_every_degenerate_kind_are_drawn(tmp_path):
    flat = example(
        truth=None,
        mask=np.zeros((64, 64), bool),
        image=np.zeros((64, 64), np.float32),
        residual=np.zeros((64, 64)),
        name="$\\nosuch" + "x" * 90 + "$.png",
    )
    evaluation.examples(tmp_path / "a.png", [flat], title="Flat", threshold=0.0)
    assert matplotlib.image.imread(tmp_path / "a.png").shape[1] == pytest.approx(1200, rel=0.02)


def test_twelve_examples_with_long_names_do_not_write_over_each_other():
    rows = [example(i, shape=(32, 64), name=f"{i}" + "long_name/" * 12, kind="kind " * 9) for i in range(12)]
    figure = build_examples(rows)
    assert len(figure.axes) == 12 * 4 + 1
    assert overlapping(figure) == []


# Histogram of scores


def bars(axes):
    """Label -> heights of its bars."""
    return {c.get_label(): np.array([bar.get_height() for bar in c]) for c in axes.containers}


def test_histogram_counts_every_image_and_stacks_the_kinds():
    rng = np.random.default_rng(0)
    kinds = {"scratch": rng.random(20) + 0.3, "patch": rng.random(30)}
    good, defective = build_histogram(rng.random(50), kinds).axes
    assert {k: v.sum() for k, v in bars(good).items()} == {"good (50)": 50}
    assert {k: v.sum() for k, v in bars(defective).items()} == {"scratch (20)": 20, "patch (30)": 30}
    lower, upper = defective.containers
    np.testing.assert_array_equal([bar.get_y() for bar in upper], [bar.get_height() for bar in lower])
    assert lower[0].get_facecolor() != upper[0].get_facecolor()


def test_histogram_tells_more_kinds_apart_than_there_are_colours():
    figure = build_histogram([0.1], {f"kind {i}": [0.2] for i in range(9)})
    looks = {(c[0].get_facecolor(), c[0].get_hatch()) for c in figure.axes[1].containers}
    assert len(looks) == 9


def test_histogram_draws_both_thresholds_with_labels_on_their_outer_sides():
    figure = build_histogram([0.1, 0.9], [0.5], threshold=0.52, calibrated=0.5)
    for axes in figure.axes:
        assert sorted(line.get_xdata()[0] for line in axes.lines) == [0.5, 0.52]
    assert {t.get_text(): t.get_ha() for t in figure.axes[0].texts} == {
        "calibrated 0.5": "right",
        "threshold 0.52": "left",
    }
    assert overlapping(figure) == []


@pytest.mark.parametrize(
    ("good", "defective", "scale"),
    [([0.1, 0.2], [1.0], "linear"), ([0.001, 0.1], [1.0], "log"), ([-1.0, 0.001], [1.0], "linear")],
)
def test_histogram_is_logarithmic_where_scores_span_decades(good, defective, scale):
    assert {axes.get_xscale() for axes in build_histogram(good, defective).axes} == {scale}


def test_histogram_keeps_zero_scores_on_a_logarithmic_axis(tmp_path):
    figure = build_histogram([0.0, 0.0, 0.001], [1.0, 3.0], threshold=0.0)
    good = bars(figure.axes[0])["good (3)"]
    assert (good[0], good.sum()) == (3, 3)
    assert "zeros" in figure.axes[1].get_xlabel()
    assert figure.axes[0].lines[0].get_xdata()[0] == 0.001
    evaluation.score_histogram(tmp_path / "a.png", [0.0, 0.001], {"bad": [1.0]}, threshold=0.0, title="t")


@pytest.mark.parametrize("score", [0.0, 0.25])
def test_histogram_of_equal_scores(tmp_path, score):
    scores = np.full(7, score)
    axes = build_histogram(scores, scores).axes[1]
    assert bars(axes)["defective (7)"].sum() == 7
    assert all(bar.get_width() > 0 for bar in axes.containers[0])
    evaluation.score_histogram(tmp_path / "a.png", scores, {"bad": scores}, threshold=score, title="t")


@pytest.mark.parametrize("defective", [{}, {"scratch": []}], ids=["no kinds", "an empty kind"])
def test_histogram_without_defective_images_has_one_panel(defective):
    (axes,) = build_histogram([0.1, 0.2], defective).axes
    assert axes.get_xlabel() == "image score"


# Curves


def curve(power, auroc=0.9, aupro_30=0.8):
    fpr = np.linspace(0, 1, 50)
    return {"fpr": fpr, "tpr": fpr**power, "pro": fpr ** (2 * power), "auroc": auroc, "aupro_30": aupro_30}


def test_curves_draw_tpr_left_and_pro_right_up_to_its_limit():
    series = {"L2": curve(0.5, 0.12345, 0.6789)}
    figure = figure_of(evaluation.curves, series, title="t")
    roc, pro = figure.axes
    np.testing.assert_array_equal(roc.lines[-1].get_ydata(), series["L2"]["tpr"])
    np.testing.assert_array_equal(pro.lines[-1].get_ydata(), series["L2"]["pro"])
    assert roc.get_xlim() == (0, 1)
    assert 0.3 < pro.get_xlim()[1] < 0.35
    assert list(pro.lines[0].get_xdata()) == [0.3, 0.3]
    assert [t.get_text() for t in figure.legends[0].texts] == ["L2:  AUROC 0.123,  AU-PRO 0.679"]


def test_curves_give_each_of_many_series_a_look_of_its_own_the_same_in_both():
    figure = figure_of(evaluation.curves, {f"method {i}": curve(0.1 + 0.05 * i) for i in range(15)}, title="t")
    looks = [[(line.get_color(), line.get_linestyle()) for line in axes.lines[1:]] for axes in figure.axes]
    assert looks[0] == looks[1]
    assert len(set(looks[0])) == 15
    assert overlapping(figure) == []


# Predictions


def prediction(scale=1.0, **maps):
    maps = maps or {"U-Net": (np.eye(64) * scale, scale), "CompactCNN": (np.eye(64) * -2.0, 0.25)}
    return evaluation.Prediction(name="000.png", image=plate(), truth=disk((64, 64), 20, 20, 5), maps=maps)


def test_predictions_have_a_panel_for_each_model_with_its_own_scale():
    swapped = dict(reversed(prediction(0.5).maps.items()))
    rows = [prediction(1.0), prediction(**swapped)]
    grid = panels(figure_of(evaluation.predictions, rows, title="t"), 2, 4)
    assert [a.texts[0].get_text() for a in grid[0]] == ["input", "truth", "U-Net", "CompactCNN"]
    assert [[a.get_title() for a in line[2:]] for line in grid] == [
        ["score 1", "score 0.25"],
        ["score 0.5", "score 0.25"],
    ]
    np.testing.assert_array_equal(grid[0, 1].images[0].get_array(), rows[0].truth)
    np.testing.assert_array_equal(grid[1, 2].images[0].get_array(), np.eye(64) * 0.5)
    assert [a.images[0].get_clim() for a in grid[1, 2:]] == [(0, 1), (-2, 0)]


def test_predictions_stay_in_line_and_apart():
    figure = figure_of(
        evaluation.predictions, [prediction(name_1=(np.eye(64), 1.0), name_2=(np.eye(64), 1.0))] * 3, title="t"
    )
    assert overlapping(figure) == []
    tops = [axes.get_position().y1 for axes in panels(figure, 3, 4)[0]]
    np.testing.assert_allclose(tops, tops[0])


def test_predictions_refuse_rows_of_other_models():
    with pytest.raises(ValueError, match="same models"):
        figure_of(evaluation.predictions, [prediction(), prediction(other=(np.eye(64), 1.0))], title="t")


# Datasets and insertion


def dataset(truth):
    return making.Dataset(name="teardrop 1", good=plate(0, truth.shape), defective=plate(1, truth.shape), truth=truth)


@pytest.mark.parametrize("centre", [(0, 0), (30, 100), (95, 127)])
def test_the_close_up_holds_the_largest_defect_and_stays_in_the_image(centre):
    largest = disk((96, 128), *centre, 12)
    axes = figure_of(making.dataset_overview, [dataset(largest | disk((96, 128), 60, 40, 3))], title="t").axes[2]
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    rows, columns = np.nonzero(largest)
    assert -0.5 <= left < columns.min() <= columns.max() < right <= 127.5
    assert -0.5 <= top < rows.min() <= rows.max() < bottom <= 95.5
    assert right - left == bottom - top == max(32, 3 * max(np.ptp(rows) + 1, np.ptp(columns) + 1) // 2)


def test_datasets_stand_in_columns_or_in_rows_where_there_are_few():
    rows = [dataset(disk((64, 64), 20, 20, 5))] * 3
    wide, few = (
        figure_of(making.dataset_overview, rows, title="t"),
        figure_of(making.dataset_overview, rows[:1], title="t"),
    )
    assert [a.texts[0].get_text() for a in panels(wide, 3, 3)[0]] == ["teardrop 1"] * 3
    assert [a.get_ylabel() for a in panels(wide, 3, 3)[:, 0]] == ["defect-free", "defective", "close-up"]
    assert [a.texts[0].get_text() for a in panels(few, 1, 3)[0]] == ["defect-free", "defective", "close-up"]
    assert len(outlines(few.axes[1], style.TRUTH)) == 1
    assert not outlines(few.axes[0], style.TRUTH)
    assert overlapping(wide) == overlapping(few) == []


def test_a_defective_image_without_a_defect_is_refused():
    with pytest.raises(ValueError, match="without a defect"):
        figure_of(making.dataset_overview, [dataset(np.zeros((64, 64), bool))], title="t")


def test_the_cut_out_shows_the_labelled_part_alone():
    label = disk((64, 64), 20, 30, 6)
    row = making.Insertion(name="a", defect=plate(), label=label, plate=plate(1), truth=disk((64, 64), 40, 9, 6))
    figure = figure_of(making.insertion, [row], title="t")
    cut_out = figure.axes[2].images[0].get_array()
    assert cut_out.count() == label.sum()
    np.testing.assert_allclose(cut_out.compressed(), plate()[label] / 255, rtol=1e-6)
    np.testing.assert_array_equal(figure.axes[4].images[0].get_array(), row.truth)
    assert overlapping(figure) == []


# Detectability


def test_detectability_draws_shares_of_tenths_a_fitted_curve_and_its_mark_within_the_sizes():
    size = np.geomspace(2, 64, 40)[::-1]
    fitted = {"curve": lambda x: x / 100, "a90_95": 20.0}
    trials = [
        detectability.Detection(name="weak", size=size, hit=size > 16, **fitted),
        detectability.Detection(name="strong", size=size, hit=size > 8, curve=None, a90_95=None),
        detectability.Detection(name="beyond", size=size, hit=size > 8, curve=None, a90_95=90.0),
    ]
    figure = figure_of(detectability.detectability, dict.fromkeys("abcd", trials), unit="mm", title="t")
    assert [axes.get_visible() for axes in figure.axes] == [True] * 4 + [False] * 2
    assert [bool(axes.get_xlabel()) for axes in figure.axes] == [False, True, True, True, False, False]
    _, dots, _, curve, mark, *others = figure.axes[3].lines
    at, shares = dots.get_data()
    order = np.sort(size).reshape(10, 4)
    np.testing.assert_allclose(at, np.exp(np.log(order).mean(1)))
    np.testing.assert_allclose(shares, (order > 16).mean(1))
    np.testing.assert_allclose(curve.get_ydata(), curve.get_xdata() / 100)
    assert (list(mark.get_xdata()), list(mark.get_ydata())) == ([20, 20], [0, 0.9])
    assert len(others) == 2 * 2
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["weak", "strong", "beyond", "a90/95"]


# Writing


def write(path):
    return training.training_curve(path, {"step": [0, 1], "loss": [1.0, 0.5]}, title="t")


def test_writing_makes_the_folder_returns_the_path_and_gives_the_same_bytes_again(tmp_path):
    path = write(tmp_path / "new" / "a.png")
    assert path == tmp_path / "new" / "a.png"
    picture = matplotlib.image.imread(path)
    assert picture.shape[1] == pytest.approx(1200, rel=0.02)
    assert picture[..., :3].std() > 0.01
    assert write(tmp_path / "new" / "b.png").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("old", [None, b"old"])
def test_a_write_cut_short_keeps_the_old_figure_and_leaves_nothing(tmp_path, old):
    path = tmp_path / "a.png"
    if old:
        path.write_bytes(old)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(InputError, match=r"a\.png") as caught:
            write(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.status == 1
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == ([("a.png", old)] if old else [])


def test_a_folder_that_is_a_file_is_the_users_mistake(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="cannot be written"):
        write(tmp_path / "file" / "a.png")


def test_no_global_state_of_matplotlib_is_touched(tmp_path):
    code = (
        "import pathlib, sys, matplotlib\n"
        "def settings():  # asking for the backend imports pyplot\n"
        "    return {k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k != 'backend'}\n"
        "before = settings()\n"
        "from steel_ad.report import training\n"
        f"training.training_curve(pathlib.Path({str(tmp_path / 'a.png')!r}), {{'step': [0], 'loss': [1.0]}}, title='t')\n"
        "assert 'matplotlib.pyplot' not in sys.modules and settings() == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_title_is_no_formula(tmp_path):
    side = coils.Coil(
        name="top",
        length=9.0,
        width=9.0,
        across=0.0,
        joints=(),
        boxes=np.array([[1.0, 2.0, 3.0, 5.0], [4.0, 4.0, 5.0, 5.0]]),
        scores=np.array([0.1, 0.9]),
        periodic=np.zeros(2, bool),
    )
    path = coils.coil_map(tmp_path / "a.png", [side], unit="px", title=r"cost_$\frac$")
    assert path.stat().st_size > 0
    # One artist for all boxes, each with its corners.
    (axes, *_) = figure_of(coils.coil_map, [side], unit="px", title="").axes
    (boxes,) = (c for c in axes.collections if len(c.get_paths()) == 2)
    np.testing.assert_array_equal(boxes.get_paths()[0].get_extents().get_points(), [[1, 2], [3, 5]])
    assert not axes.patches


def view(name, seed):
    rng = np.random.default_rng(seed)
    return spectra.View(
        name=name,
        image=rng.random((16, 24)),
        log_amplitude=rng.random((16, 24)),
        phase=rng.uniform(-np.pi, np.pi, (16, 24)),
        mean_log_amplitude=rng.random((16, 24)),
        images=3,
        autocorrelation=rng.random((9, 9)),
        lattice=None,
    )


def test_phases_shows_each_plate_above_the_middle_of_its_phase_spectrum():
    views = [view("procedural_teardrop1", 0), view("lens", 1)]
    figure = figure_of(spectra.phases, views)
    above, below = figure.axes[:2], figure.axes[2:]
    assert [axes.get_title() for axes in above] == ["teardrop1", "lens"]
    assert (above[0].get_ylabel(), below[0].get_ylabel()) == ("plate", "phase")
    for seen, top, bottom in zip(views, above, below, strict=True):
        np.testing.assert_array_equal(top.images[0].get_array(), seen.image)
        assert top.images[0].get_cmap().name == "gray"
        # From a quarter of a cycle a pixel below zero to one above: rows 4 to 12 of 16, columns 6 to 18 of 24.
        np.testing.assert_array_equal(bottom.images[0].get_array(), seen.phase[4:13, 6:19])
        assert bottom.images[0].get_cmap().name == "twilight"
        assert bottom.images[0].get_clim() == (-np.pi, np.pi)


def test_promises_has_a_point_a_case_and_the_mean_of_each_rate():
    plain = {"calibrated_on": "all", "fresh": 1000, "rate": 0.01}
    cases = [
        {**plain, "plates": "independent", "form": "average", "map": "whitening", "promised": 0.01, "alarms": 8},
        {**plain, "plates": "independent", "form": "average", "map": "lattice", "promised": 0.01, "alarms": 0},
        {
            **plain,
            "plates": "independent",
            "form": "average",
            "map": "lattice",
            "promised": 0.05,
            "rate": 0.05,
            "alarms": 40,
        },
        {
            **plain,
            "plates": "in strips",
            "form": "confidence",
            "map": "lattice",
            "promised": 0.01,
            "alarms": 8,
            "fresh": 400,
        },
    ]
    figure = figure_of(studies.promises, cases)
    average, average_strips, sure, sure_strips = figure.axes
    assert [a.get_title() for a in (average, average_strips)] == ["independent", "in strips: all"]
    assert [a.get_ylabel() for a in (average, sure)] == [
        "average form\nobserved rate",
        "confidence form\nobserved rate",
    ]
    assert {a.get_xlabel() for a in (sure, sure_strips)} == {"promised rate"}
    whitening, lattice = (c.get_offsets() for c in average.collections)
    # Maps stand side by side, a factor of 1.12 apart; no alarm is drawn at half an alarm.
    np.testing.assert_allclose(whitening, [[0.01 / 1.12**0.5, 0.008]])
    np.testing.assert_allclose(lattice, [[0.01 * 1.12**0.5, 0.0005], [0.05 * 1.12**0.5, 0.04]])
    as_promised, *means = average.lines
    np.testing.assert_array_equal(as_promised.get_xdata(), as_promised.get_ydata())
    np.testing.assert_allclose([line.get_ydata() for line in means], [[0.004, 0.004], [0.04, 0.04]])
    np.testing.assert_allclose(means[0].get_xdata(), [0.01 / 1.4, 0.01 * 1.4])
    np.testing.assert_allclose(average.get_xlim(), [0.01 / 1.7, 0.05 * 1.7])
    np.testing.assert_allclose(average.get_ylim(), [0.0005, 0.05 * 1.7 * 1.1])
    assert (average.get_xscale(), average.get_yscale()) == ("log", "log")
    assert [len(c.get_offsets()) for c in sure.collections] == [0, 0]
    np.testing.assert_allclose(sure_strips.collections[1].get_offsets(), [[0.01 * 1.12**0.5, 0.02]])
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["whitening", "lattice", "mean", "as promised"]


class Page(html.parser.HTMLParser):
    """Text and attributes of a page, tag by tag."""

    def __init__(self, text):
        super().__init__()
        self.seen = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.seen.append([tag, dict(attributes), ""])

    def handle_data(self, data):
        if self.seen:
            self.seen[-1][2] += data

    def of(self, tag):
        return [(attributes, text) for t, attributes, text in self.seen if t == tag]


def test_the_inspections_page_has_what_it_was_given_and_one_unit():
    given = {
        "title": "Coil <7>",
        "verdict": "2 defects & more",
        "clean": False,
        "facts": [("model", "ab<c"), ("rate", "0.01")],
        "pictures": [('the "map"', b"png1")],
        "close_ups": {1: b"png2"},
    }
    empty = {"image": "", "along_px": 20, "along_mm": 2.0, "area_px": 9, "across_px": 7, "p_value": None}
    rows = [
        {**empty, "defect": 0, "peak": 0.123456},
        {**empty, "defect": 1, "peak": 2, "camera": "left", "area_mm2": 0.09},
    ]
    found = Page(
        page.inspection(**given, rows=[{"camera": None, "area_mm2": None} | r for r in rows], note="so it is <there>")
    )
    assert [t for _, t in found.of("title")] == [t for _, t in found.of("h1")] == ["Coil <7>"]
    assert [t for _, t in found.of("h2")] == ['the "map"', "Defects", "How it was inspected"]
    heads = [text for _, text in found.of("th")]
    # Pixels only where no row has millimetres; no columns that are empty everywhere.
    assert heads == ["close-up", "defect", "camera", "along mm", "area mm2", "across px", "peak", "model", "rate"]
    (top,) = [text for attributes, text in found.of("p") if attributes.get("class") == "verdict defects"]
    assert top == "2 defects & more"
    assert found.of("p")[-1][1] == "so it is <there>"
    sources = [attributes["src"].partition(",")[2] for attributes, _ in found.of("img")]
    assert sources == ["cG5nMQ==", "cG5nMg=="]  # base64 of png1 and png2
    assert found.of("img")[0][0]["alt"] == 'the "map"'
    shown = [(attributes.get("data-value"), text) for attributes, text in found.of("td")]
    assert shown[1:7] == [("0", "0"), ("", ""), ("2.0", "2.000"), ("", ""), ("7", "7"), ("0.123456", "0.1235")]
    assert shown[8:14] == [("1", "1"), ("left", "left"), ("2.0", "2.000"), ("0.09", "0.09000"), ("7", "7"), ("2", "2")]
    assert [text for _, text in found.of("code")] == ["ab<c", "0.01"]

    clean = Page(page.inspection(**{**given, "clean": True, "close_ups": {}}, rows=[]))
    assert [attributes["class"] for attributes, _ in clean.of("p")] == ["verdict clean"]
    assert [t for _, t in clean.of("h2")] == ['the "map"', "How it was inspected"]


def test_shares_by_contrast_are_bars_with_their_numbers():
    names = ("<1", "1-2", ">5")
    maps = {
        "ssim": {n: {"images": i, "found": f} for n, i, f in zip(names, (4, 0, 2), (0.25, np.nan, 1.0), strict=True)},
        "l2": {n: {"images": i, "found": f} for n, i, f in zip(names, (4, 0, 2), (0.0, np.nan, 0.5), strict=True)},
    }
    figure = figure_of(evaluation.found_by_contrast, maps, title="t")
    (axes,) = figure.axes
    assert [[bar.get_height() for bar in bars] for bars in axes.containers] == [[0.25, 0, 1], [0, 0, 0.5]]
    assert [text.get_text() for text in axes.texts] == ["0.25", "", "1.00", "0.00", "", "0.50"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["<1\n(4)", "1-2\n(0)", ">5\n(2)"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ssim", "l2"]
    first, second = ([bar.get_x() for bar in bars] for bars in axes.containers)
    np.testing.assert_allclose(np.subtract(second, first), 0.4)
