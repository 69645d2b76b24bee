"""The table of forms: which one each backend gets, row by row."""

import jax
import numpy as np
import pytest

from steel_ad import native
from steel_ad.ops import forms

COMPILED, ALONE = True, False


def arrays(*shapes):
    # Of numpy, since nothing should be compiled while tests are collected.
    return [np.zeros(shape, np.float32) for shape in shapes]


def kernel(k, i, o, width=16):
    return arrays((1, 8, width, i), (k, k, i, o))


IMAGES = arrays((16, 16), (16, 16))
ROWS = [
    ("same", kernel(3, 2, 4), {"cpu": "native", "gpu": "plain", "tpu": "plain"}, COMPILED),
    ("same", kernel(3, 2, 4), {"cpu": "plain"}, ALONE),
    ("same", kernel(2, 2, 4), {"cpu": "plain"}, COMPILED),
    ("same", arrays((1, 8, 8, 2), (3, 5, 2, 4)), {"cpu": "plain"}, COMPILED),
    ("large", kernel(7, 2, 4), {"cpu": "same", "gpu": "same"}, COMPILED),
    ("large", kernel(7, 2, 4), {"cpu": "spectra", "tpu": "same"}, ALONE),
    ("large", kernel(9, 2, 4), {"cpu": "spectra"}, COMPILED),
    ("narrow", kernel(3, 2, 4, width=4), {"cpu": "same", "gpu": "abreast", "tpu": "same"}, COMPILED),
    ("narrow", kernel(3, 2, 4, width=6), {"gpu": "same"}, COMPILED),
    ("narrow", kernel(3, 1, 4, width=8), {"gpu": "abreast"}, COMPILED),
    ("narrow", kernel(3, 1, 4, width=12), {"gpu": "same"}, COMPILED),
    ("halve", kernel(4, 2, 4), {"cpu": "native", "gpu": "blocks", "tpu": "plain"}, COMPILED),
    ("halve", kernel(4, 2, 4), {"cpu": "blocks"}, ALONE),
    ("double", kernel(4, 2, 1), {"cpu": "native", "gpu": "overlaps", "tpu": "plain"}, COMPILED),
    ("double", kernel(4, 2, 4), {"cpu": "native", "gpu": "blocks", "tpu": "plain"}, COMPILED),
    ("double", kernel(4, 2, 1), {"cpu": "overlaps"}, ALONE),
    ("double", kernel(4, 2, 2), {"cpu": "blocks"}, ALONE),
    ("double, gradient of x", kernel(4, 2, 1), {"cpu": "plain", "gpu": "blocks"}, ALONE),
    ("double, gradient of x", kernel(4, 2, 2), {"gpu": "plain"}, ALONE),
    ("double, gradient of kernel", kernel(4, 2, 1), {"gpu": "same form"}, ALONE),
    ("double, gradient of kernel", kernel(4, 2, 2), {"cpu": "same form", "gpu": "gradient of halve"}, ALONE),
    ("transpose_2x2", kernel(2, 2, 4), {"cpu": "products", "gpu": "products", "tpu": "plain"}, ALONE),
    ("max_pool", kernel(2, 2, 4)[:1], {"cpu": "slices", "gpu": "slices", "tpu": "plain"}, ALONE),
    ("channel_sum", kernel(3, 2, 4)[:1], {"cpu": "in two steps", "gpu": "plain", "tpu": "plain"}, ALONE),
    ("channel_sum", kernel(3, 2, 4, width=8)[:1], {"cpu": "plain"}, ALONE),
    ("ssim", [*IMAGES, True, True, 11], {"cpu": "native", "gpu": "cuda", "tpu": "plain"}, COMPILED),
    ("ssim", [*IMAGES, True, True, 11], {"cpu": "plain", "gpu": "plain"}, ALONE),
    ("ssim", [*IMAGES, True, True, 8], {"cpu": "native", "gpu": "plain"}, COMPILED),
    ("ssim", [*IMAGES, True, False, 11], {"cpu": "native", "gpu": "plain"}, COMPILED),
    ("ssim", [*IMAGES, False, True, 11], {"cpu": "general", "gpu": "general", "tpu": "general"}, COMPILED),
]


@pytest.mark.parametrize(("operation", "arguments", "names", "compiled"), ROWS)
def test_each_backend_gets_its_form(monkeypatch, operation, arguments, names, compiled):
    monkeypatch.setattr(native, "ready", lambda *_: compiled)
    monkeypatch.setattr(native, "cuda_ready", lambda k, *_: compiled and k == 11)
    for backend, name in names.items():
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        assert forms.choose(operation, *arguments) == name, backend


def test_every_row_of_the_table_is_reached():
    reached = {(operation, name) for operation, _, names, _ in ROWS for name in names.values()}
    assert reached == {(operation, form.name) for operation, rows in forms.FORMS.items() for form in rows}
