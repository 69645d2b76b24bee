import subprocess
import sys

import numpy as np
import pytest

from steel_ad.report import tables

ROWS = [
    {"method": "L2", "auroc": np.float32(0.9), "epochs": 200, "time": 1234567.0},
    {"method": "SSIM | full", "auroc": float("nan"), "epochs": 5},
]


def test_columns_are_aligned_numbers_to_the_right():
    assert tables.table(ROWS, ["method", "auroc", "epochs"]).splitlines() == [
        "method        auroc  epochs",
        "-----------  ------  ------",
        "L2           0.9000     200",
        "SSIM | full       -       5",
    ]


def test_chief_metrics_are_rows_of_maps():
    maps = {"ssim": {"pixel_auroc": 0.75, "defects_found": {"iou_0": 0.5}}, "l2": {"image_tpr": 1.0}}
    header, _, *rows = (line.split() for line in tables.metrics(maps).splitlines())
    found = [dict(zip(header, row, strict=True)) for row in rows]
    assert [row["map"] for row in found] == ["ssim", "l2"]
    assert found[0] == dict.fromkeys(header, "-") | {"map": "ssim", "pixel_auroc": "0.7500", "found": "0.5000"}
    assert found[1] == dict.fromkeys(header, "-") | {"map": "l2", "image_tpr": found[1]["image_tpr"]}
    assert float(found[1]["image_tpr"]) == 1


def test_markdown_escapes_the_bar():
    assert tables.markdown(ROWS, ["method", "auroc"]).splitlines() == [
        "| method | auroc |",
        "| :-- | --: |",
        "| L2 | 0.9000 |",
        "| SSIM \\| full | - |",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (np.float64("nan"), "-"),
        (0.0, "0.000"),
        (1234.4, "1234"),
        (1234567.0, "1.235e+06"),
        (2e-4, "0.0002000"),
        (float("inf"), "inf"),
        (1_122_881, "1122881"),
        (np.int64(7), "7"),
        (np.bool_(True), "yes"),
        ("two\nlines", "two lines"),
    ],
)
def test_a_cell_of(value, text):
    assert tables.table([{"a": value}], ["a"]).splitlines()[-1].strip() == text


def test_a_table_without_rows_is_its_header():
    assert tables.table([], ["a", "bc"]) == "a  bc\n-  --"
    assert tables.markdown([], ["a"]) == "| a |\n| :-- |"


def test_only_the_columns_asked_for_in_their_order():
    assert tables.table(ROWS, ["epochs", "method"]).splitlines()[0] == "epochs  method"


def test_tables_do_without_matplotlib():
    code = "import sys, steel_ad.report.tables; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
