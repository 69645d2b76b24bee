"""Who may import whom, and that every kernel and step lowers for every platform."""

import ast
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steel_ad.config import Autoencoder
from steel_ad.data import patches, plates
from steel_ad.detectors import autoencoder
from steel_ad.detectors.autoencoder import AutoencoderDetector
from steel_ad.ops import forms, morphology, sliding, ssim
from steel_ad.train.step import make_step

ROOT = Path(__file__).parent.parent
# Imports go down this list only; the last line's modules are everybody's.
ROOMS = [
    ["experiments", "configs", "steel_ad.__main__"],
    ["steel_ad.benchmark"],
    ["steel_ad.research"],
    ["steel_ad.making"],
    ["steel_ad.runs"],
    ["steel_ad.inspection"],
    ["steel_ad.report"],
    ["steel_ad.detectors"],
    ["steel_ad.train"],
    ["steel_ad.data"],
    ["steel_ad.models"],
    ["steel_ad.losses"],
    ["steel_ad.metrics"],
    ["steel_ad.ops"],
    ["steel_ad.cli"],
    ["steel_ad.usage"],
    ["steel_ad.recipes"],
    ["steel_ad.versions"],
    ["steel_ad.native"],
    ["steel_ad.named"],
    ["steel_ad.progress"],
    ["steel_ad.files"],
    ["steel_ad.parallel"],
    ["steel_ad.config"],
    ["steel_ad.fields"],
    ["steel_ad.errors", "steel_ad.__init__", "steel_ad.__version__"],
]
SOURCES = [p for folder in ("experiments", "configs", "steel_ad") for p in sorted((ROOT / folder).rglob("*.py"))]
# Heavy or replaceable packages, and the only places that know them; what is measured against the project may use all.
PEERS = "steel_ad/benchmark/peers/"
OWNERS = {
    "matplotlib": ("steel_ad/report/",),
    "orbax": ("steel_ad/train/checkpoint.py",),
    "cv2": ("steel_ad/data/", PEERS),
    "grain": ("steel_ad/data/workers.py",),
    "flax": ("steel_ad/models/", "steel_ad/train/state.py", PEERS),
}


def room(module):
    for level, names in enumerate(ROOMS):
        if any(module == n or module.startswith(n + ".") for n in names):
            return level
    raise AssertionError(f"{module} is in no room: give it one in ROOMS")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def name(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return module.removesuffix(".__init__") if module != "steel_ad.__init__" else module


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_imports_go_down(path):
    for imported in imports(path):
        if imported.split(".")[0] in ("steel_ad", "experiments", "configs"):
            assert room(imported) >= room(name(path)), f"{name(path)} imports {imported}, which is above it"


@pytest.mark.parametrize("package", OWNERS)
def test_packages_have_one_owner(package):
    for path in SOURCES:
        if any(i.split(".")[0] == package for i in imports(path)):
            assert str(path.relative_to(ROOT)).startswith(OWNERS[package]), f"{path} imports {package}"


IMPORTS = """
import importlib, pkgutil
from absl import flags
from jax._src import xla_bridge
for package in ("steel_ad", "experiments", "configs"):
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        before = set(flags.FLAGS)
        importlib.import_module(module.name)
        # Binaries define flags of the same names.
        flags.FLAGS.remove_flag_values(set(flags.FLAGS) - before)
        assert not xla_bridge._backends, module.name
"""


def test_no_import_starts_a_backend():
    """A process must be able to choose its devices, or join others, after its imports."""
    subprocess.run([sys.executable, "-c", IMPORTS], check=True, cwd=ROOT)


TINY = Autoencoder(patch_size=32, latent=4, crops="fresh", flips=True, batch_size=2, steps=2, stride=16)


def step_program():
    root = jax.random.key(0)
    data = autoencoder.Good(jax.tree.map(jnp.asarray, patches.stack([np.zeros((40, 40), np.uint8)] * 2)))
    step = make_step(autoencoder.objective(TINY), autoencoder.optimizer(TINY), steps_per_call=2)
    return step, (autoencoder.initial_state(TINY, root), data, root)


def residual_program(kind):
    params = autoencoder.initial_state(TINY, jax.random.key(0)).params
    detector = AutoencoderDetector(TINY).only(kind)
    return jax.jit(jax.vmap(detector.residual, in_axes=(None, 0))), (params, jnp.zeros((2, 48, 40)))


IMAGE = np.zeros((40, 48), np.float32)
PROGRAMS = {
    "train step": step_program,
    "ssim residual": lambda: residual_program("ssim"),
    "l2 residual": lambda: residual_program("l2"),
    "ssim uniform": lambda: (jax.jit(jax.grad(lambda x: ssim.ssim_map(x, IMAGE).sum())), (IMAGE,)),
    "ssim gaussian": lambda: (jax.jit(jax.grad(lambda x: ssim.ssim_map(x, IMAGE, window="gaussian").sum())), (IMAGE,)),
    "windows": lambda: (jax.jit(lambda x: sliding.windows(x, size=16, stride=7)), (IMAGE,)),
    "average": lambda: (
        jax.jit(lambda t: sliding.average(t, shape=(32, 32), stride=8)),
        (jnp.zeros((9, 16, 16)),),
    ),
    "opening": lambda: (jax.jit(lambda x: morphology.grey_opening(x, radius=4)), (IMAGE,)),
    "plates": lambda: (jax.jit(lambda k: plates.render(k, "teardrop1", size=32, num=2)), (jax.random.key(0),)),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_lowers_for_every_platform(program):
    function, arguments = PROGRAMS[program]()
    platforms = ("cpu", "cuda", "tpu")
    exported = jax.export.export(function, platforms=platforms)(*arguments)
    assert exported.platforms == platforms


@pytest.mark.parametrize("program", ["train step", "ssim residual"])
def test_what_an_accelerator_runs_lowers_too(program, monkeypatch):
    """The plain convolutions, which the backend of this process does not choose."""
    for operation in ("halve", "double"):
        monkeypatch.setitem(forms.FORMS, operation, forms.FORMS[operation][-1:])
    jax.clear_caches()
    function, arguments = PROGRAMS[program]()
    exported = jax.export.export(function, platforms=("cuda", "tpu"))(*arguments)
    assert "lhs_dilate" in exported.mlir_module() or "lhs_dilation" in exported.mlir_module()
    jax.clear_caches()
