"""The thesis' claims as rules on the results, and the published figures.

A claim compares A with B, data set by data set, by the differences A - B of one metric in runs that share everything else,
the seed too. It holds on a data set where the 95 % confidence interval of the mean difference (Student's t) lies above minus
the margin, and fails where it lies below. Where A or B is the better of several, each pair has an interval of its own, at a
level of 5 % divided by the number of pairs, so that all of them are right in 95 % of cases (Bonferroni); the best member of A
is held against the best of B. Choosing the better one seed by seed instead would prefer the side of more members by chance.
A claim is confirmed if it holds on every data set with at least three seeds, refuted if it fails on one, else undecided.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from steel_ad import config as configs
from steel_ad.research import results

_SEEDS = 3
Rows = Sequence[Mapping[str, Any]]
# ("a" or "b", which of several)
Member = tuple[str, str]
# (data set, what else is shared) -> (member of A, member of B) -> differences A - B, one a seed
Differences = dict[tuple[str, str], dict[tuple[str, str], list[float]]]


@dataclasses.dataclass(frozen=True)
class Claim:
    """`differences` takes the rows of methods, the rows of studies and the metric."""

    text: str
    compared: str
    metric: str
    differences: Callable[[Rows, Rows, str], Differences]
    margin: float = 0.0


@dataclasses.dataclass(frozen=True)
class Judged:
    """Of one data set: the number of seeds, mean difference, its interval, and "holds", "fails" or "open"."""

    dataset: str
    seeds: int
    mean: float
    low: float
    high: float
    verdict: str


def judge(claim: Claim, methods: Rows, studies: Rows) -> tuple[str, list[Judged]]:
    """ "confirmed", "refuted" or "undecided", and what each data set says."""
    found = []
    differences = claim.differences(methods, studies, claim.metric)
    for (dataset, _), pairs in sorted(differences.items(), key=lambda item: item[0][0]):
        n = len(next(iter(pairs.values())))
        intervals = {pair: _interval(values, 1 - 0.05 / len(pairs)) for pair, values in pairs.items()}
        # The best of A against each of B, then the hardest of B; of means and of either bound alike.
        against = [[i for (_, of), i in intervals.items() if of == b] for b in {b for _, b in pairs}]
        mean, low, high = (min(max(i[k] for i in of_b) for of_b in against) for k in range(3))
        verdict = "open"
        if n >= _SEEDS:
            verdict = "holds" if low > -claim.margin else "fails" if high < -claim.margin else "open"
        found.append(Judged(dataset, n, mean, low, high, verdict))
    enough = [j for j in found if j.seeds >= _SEEDS]
    if any(j.verdict == "fails" for j in enough):
        return "refuted", found
    return ("confirmed" if enough and all(j.verdict == "holds" for j in enough) else "undecided"), found


def _interval(values: Sequence[float], level: float) -> tuple[float, float, float]:
    """Mean, and the ends of its confidence interval."""
    n, mean = len(values), float(np.mean(values))
    half = math.inf
    if n >= 2:
        half = float(stats.t.ppf((1 + level) / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
    return mean, mean - half, mean + half


def _paired(
    rows: Rows,
    keys: Callable[[Mapping[str, Any]], tuple[str, str]],
    metric: str,
    side: Callable[[Mapping[str, Any]], Member | None],
    needed: Collection[Member],
) -> Differences:
    """Differences of rows with the same keys and seed, from seeds that have every member that is needed or found."""
    groups: dict[tuple[str, str], dict[str, dict[Member, float]]] = {}
    for row in rows:
        if (member := side(row)) and row[metric] is not None:
            groups.setdefault(keys(row), {}).setdefault(row["seed"], {})[member] = row[metric]
    found = {}
    for key, seeds in groups.items():
        members = {*needed, *(m for of_seed in seeds.values() for m in of_seed)}
        whole = [of_seed for of_seed in seeds.values() if len(of_seed) == len(members)]
        a, b = (sorted(name for which, name in members if which == w) for w in "ab")
        if whole and a and b:
            found[key] = {(i, j): [s["a", i] - s["b", j] for s in whole] for i in a for j in b}
    return found


def _along(study: str, name: str, side: Callable[[str], str], needed: Collection[Member]):
    """Of a study's map, values of its axis that are "a" and that are "b"; "" is neither."""

    def differences(methods: Rows, studies: Rows, metric: str) -> Differences:
        rows = [r for r in studies if r["study"] == study and r["map"] == name]
        return _paired(
            rows,
            lambda r: (r["dataset"], r["base"]),
            metric,
            lambda r: (which, r["value"]) if (which := side(r["value"])) else None,
            needed,
        )

    return differences


def _by(experiment: str, setting: str, members: Mapping[tuple[str, str], Member]):
    """Of an experiment's methods, (value of a setting, map) that are members; runs are alike in all settings but that."""

    def differences(methods: Rows, studies: Rows, metric: str) -> Differences:
        return _paired(
            [r for r in methods if r["experiment"] == experiment],
            lambda r: (r["dataset"], results.without(r, "seed", setting)),
            metric,
            lambda r: members.get((results.settings(r)[setting], r["map"])),
            members.values(),
        )

    return differences


_NETWORKS = {("unet", "segmentation"): ("a", ""), ("compact_cnn", "segmentation"): ("b", "")}
_LOSSES = {("ssim", "ssim"): ("a", ""), ("l2", "l2"): ("b", "L2"), ("ssim", "l2"): ("b", "SSIM")}


_RATIOS = (("a", "1:1"), ("a", "1:3"), ("b", "1:0"))
CLAIMS = (
    Claim(
        "25 epochs are enough",
        "A: 25 epochs, B: the best of more (study `epochs` of `segmentation`)",
        "pixel_auroc",
        _along("epochs", "segmentation", lambda v: "a" if v == "25" else "b" if float(v) > 25 else "", [("a", "25")]),
        margin=0.005,
    ),
    Claim(
        "Training on a mixture of defective and good samples is best",
        "A: the better of 1:1 and 1:3, B: 1:0 (study `ratio` of `segmentation`)",
        "pixel_auroc",
        _along("ratio", "segmentation", lambda v: {"1:1": "a", "1:3": "a", "1:0": "b"}.get(v, ""), _RATIOS),
    ),
    Claim(
        "U-Net localises better than CompactCNN",
        "A: U-Net, B: CompactCNN, their maps",
        "aupro_30",
        _by("segmentation", "model", _NETWORKS),
    ),
    Claim(
        "An autoencoder trained with SSIM localises best",
        "A: SSIM-AE with SSIM map, B: the better of L2-AE and SSIM-AE with L2 map",
        "aupro_30",
        _by("autoencoder", "loss", _LOSSES),
    ),
    Claim(
        "Windows every 32 pixels are better than every 128",
        "A: 32, B: 128, SSIM map (study `stride`)",
        "pixel_auroc",
        _along("stride", "ssim", lambda v: {"32": "a", "128": "b"}.get(v, ""), [("a", "32"), ("b", "128")]),
    ),
)


@dataclasses.dataclass(frozen=True)
class Published:
    """A pixel AUROC that others report, on data that is not here; `ours` is what our methods of that name have in common."""

    method: str
    data: str
    pixel_auroc: float
    source: str
    ours: Mapping[str, str]


_THESIS = "the thesis, table 2-1"
_BERGMANN = "Bergmann et al. 2019"
_FABRIC = "Bergmann et al. 2018"
_SSIM_AE, _L2_AE = ({"experiment": "autoencoder", "loss": loss, "map": loss} for loss in ("ssim", "l2"))
_COMPACT, _UNET = (
    {"experiment": "segmentation", "model": model, "map": "segmentation"} for model in ("compact_cnn", "unet")
)
PUBLISHED = (
    *(
        Published(method, f"data set {number}, {side}x{side}", value, _THESIS, ours)
        for method, ours, values in (
            ("CompactCNN", _COMPACT, (0.9942, 0.9889, 0.9912, 0.9958)),
            ("U-Net", _UNET, (0.9986, 0.9967, 0.9993, 0.9976)),
        )
        for (number, side), value in zip(itertools.product((1, 2), (256, 512)), values, strict=True)
    ),
    *(
        Published(method, f"MVTec AD, {data}", value, _BERGMANN, ours)
        for data, ssim, l2 in (
            ("grid", 0.94, 0.90),
            ("carpet", 0.87, 0.59),
            ("leather", 0.78, 0.75),
            ("tile", 0.59, 0.51),
            ("wood", 0.73, 0.73),
        )
        for method, value, ours in (("SSIM-AE", ssim, _SSIM_AE), ("L2-AE", l2, _L2_AE))
    ),
    Published("SSIM-AE", "woven fabric", 0.966, _FABRIC, _SSIM_AE),
    Published("L2-AE", "woven fabric", 0.688, _FABRIC, _L2_AE),
)


def ours(published: Published, methods: Rows) -> str:
    """Medians over seeds of the method's pixel AUROC, from the least to the greatest over data sets."""
    known = [(r, results.method(r)) for r in methods if r["pixel_auroc"] is not None]
    rows = [{**r, "method": configs.canonical(m)} for r, m in known if published.ours.items() <= m.items()]
    medians = [
        {"pixel_auroc": float(np.median([r["pixel_auroc"] for r in same]))}
        for same in results.series(rows, "dataset", "method").values()
    ]
    return results.spread(medians, "pixel_auroc")
