"""Binaries from outside: help, one sentence for a wrong flag, the command steel-ad, and a wheel that works without a clone."""

import ast
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest

import steel_ad
from steel_ad import cli, fields, recipes
from steel_ad import config as configs
from steel_ad.making import settings as making

ROOT = Path(__file__).parent.parent
SETTINGS = {
    "autoencoder": [configs.Autoencoder],
    "benchmark": [],
    "detectability": [configs.Detectability],
    "export": [configs.Export],
    "false_alarms": [configs.FalseAlarms],
    "inspection": [configs.Inspection],
    "make_dataset": [making.FromVideo, making.Inserted, making.Thesis],
    "recurrence": [configs.SimulatedRolls],
    "report": [],
    "segmentation": [configs.Segmentation],
    "spectrum": [configs.Spectrum],
    "sweep": [configs.Autoencoder],
    "transfer": [configs.Segmentation],
}
BINARIES = sorted(p.stem for p in (ROOT / "experiments").glob("*.py") if p.stem != "__init__")
# Runs a binary and says what it has imported.
SPY = """
import atexit, runpy, sys
atexit.register(lambda: print("IMPORTED", *(m for m in ("jax", "flax", "cv2", "orbax", "matplotlib") if m in sys.modules)))
runpy.run_module(sys.argv[1], run_name="__main__", alter_sys=True)
"""


def start(*line, cwd=ROOT, **environment):
    environment = {**os.environ, "COLUMNS": "110", **environment}
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


def sentence(result, *said):
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert all(s in line for s in said), line


def test_every_binary_is_known_here():
    assert set(SETTINGS) == set(BINARIES)


@pytest.mark.parametrize("binary", BINARIES)
def test_help_has_every_setting_and_imports_nothing_heavy(binary):
    """`-h` too; what the processor or its memory would be asked for comes after the flags."""
    found = start(sys.executable, "-c", SPY, f"experiments.{binary}", "-h")
    assert found.returncode == 0, found.stderr
    assert found.stderr == ""
    assert found.stdout.endswith("IMPORTED\n")
    module = ast.parse((ROOT / "experiments" / f"{binary}.py").read_text())
    assert found.stdout.startswith(ast.get_docstring(module))
    words = " ".join(found.stdout.split())
    for kind in SETTINGS[binary]:
        for field in fields.fields(kind):
            name = "--loss_option" if field.name == "loss_options" else f"{kind.flag}{field.name}"
            assert (name if field.type is not bool else f"--[no]{name.removeprefix('--')}") in words
            assert field.help in words
        if kind.flag == "--config.":
            assert recipes.table(ROOT / "configs" / f"{kind.__name__.lower()}.py") in found.stdout
    assert "--compilation_cache (" in words
    assert all(len(line) <= 140 for line in found.stdout.splitlines())


def test_help_shows_the_values_of_the_preset():
    quick, thesis = (
        start(sys.executable, "-m", "experiments.autoencoder", *flags).stdout
        for flags in (("--help",), ("--config=thesis", "--help", "--loss_option=x=3"))
    )
    assert "--config.crops (fresh): " in quick
    assert "--config.crops (fixed): " in thesis
    assert "those of --config=thesis" in thesis
    sentence(start(sys.executable, "-m", "experiments.autoencoder", "--config=fast", "-h"), "no preset 'fast'")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("autoencoder --wrokdir=x", ["no flag --wrokdir", "did you mean --workdir?", "evaluate_only"]),
        ("autoencoder --config.lss=l2", ["no setting --config.lss", "did you mean --config.loss?", "latent"]),
        ("autoencoder --config.latent=many", ["--config.latent=many must be a whole number"]),
        ("autoencoder --config.dtype=float16", ["--config.dtype=float16 must be one of float32, bfloat16"]),
        ("autoencoder --config.latent=0", ["--config.latent=0 must be at least 1"]),
        ("autoencoder --config.seed -1", ["--config.seed=-1 must be at least 0"]),
        ("autoencoder --loss_option=7", ["--loss_option=7 must have the form name=value"]),
        ("autoencoder --config=configs/nothing.py", ["there is no file configs/nothing.py"]),
        ("autoencoder --config=fast", ["no preset 'fast'", "thesis, quick, demo, tiny"]),
        ("autoencoder --config=configs/autoencoder.py:fast", ["no preset 'fast'"]),
        ("autoencoder positional", ["'positional' is no flag"]),
        ("autoencoder --workdir", ["Missing value for flag --workdir"]),
        ("autoencoder --num_processes=0", ["--num_processes=0: 0 is not a positive integer"]),
        ("autoencoder", ["--workdir is missing"]),
        ("sweep --experiment=segmentation --config.latent=3", ["no setting --config.latent", "upsampling"]),
        ("spectrum --loss_option=a=1", ["no flag --loss_option"]),
        ("make_dataset", ["give a command: from_video, insert, thesis"]),
        ("make_dataset inset", ["'inset' is not a command"]),
        (
            "make_dataset insert --size=3",
            ["--size is not a flag of insert, which has --out, --data, --defects, --num_test"],
        ),
        ("make_dataset thesis --out=x --num_test=6", ["--num_test=6 must be a multiple of 4"]),
        ("make_dataset from_video --out=x", ["--video is missing"]),
        ("detectability --contrasts=0.1,x", ["--contrasts=0.1,x must be a list, each of it a finite number"]),
    ],
)
def test_wrong_flags_end_in_one_sentence(line, said):
    binary, *flags = line.split()
    sentence(start(sys.executable, "-m", f"experiments.{binary}", *flags), *said)


def test_a_sentence_keeps_its_quotation_marks_and_spaces():
    name = """my "own"  'loss'"""
    found = start(sys.executable, "-m", "experiments.autoencoder", f"--config.loss={name}", "--workdir=/tmp/none")
    sentence(found, repr(name))
    sentence(start(sys.executable, "-m", "experiments.autoencoder", f"--config=a  {name}.py"), f"no file a  {name}.py:")


PRINT = """
import sys
from steel_ad import cli, config
holder = cli.define_config(config.Autoencoder, "autoencoder", "tiny")
cli._parse(sys.argv, {})
print(config.to_dict(holder.value))
"""


def test_flags_change_the_preset():
    def settings(*flags):
        found = start(sys.executable, "-c", PRINT, "--compilation_cache=", "--nonative", *flags)
        assert found.returncode == 0, found.stderr
        return ast.literal_eval(found.stdout)

    tiny = settings()
    assert tiny["flips"] is True
    flags = ("--config.maps=('l2',)", "--noconfig.flips", "-config.latent", "9", "--config.clip_norm=1e-1")
    flags += ("--loss_option=sizes=(3,5)", "--loss_option", "kind=plain", "--config.loss_options.weight=0.5")
    changes = {"maps": ["l2"], "flips": False, "latent": 9, "clip_norm": 0.1}
    options = {"sizes": [3, 5], "kind": "plain", "weight": 0.5}
    assert settings(*flags) == {**tiny, **changes, "loss_options": options}
    # The last of equal flags counts; a value of the preset's own can be given.
    assert settings("--config.steps=3", "--config.steps=8") == tiny
    assert settings("--config=thesis", "--config.maps=l2,ssim")["maps"] == ["l2", "ssim"]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--a=1", "--b", "2", "-c=3", "-d", "4"], ["--a=1", "--b=2", "--c=3", "--d=4"]),
        (["--seed", "-1", "--x", "-.5", "--y=-2"], ["--seed=-1", "--x=-.5", "--y=-2"]),
        (["--watch", "--noflips", "--out", "a b"], ["--watch", "--noflips", "--out=a b"]),
        (["insert", "--out=x", "thesis"], ["insert", "--out=x", "thesis"]),
    ],
)
def test_every_form_of_a_flag_is_one_word(words, found):
    assert cli.joined(words) == found


def test_a_flag_is_known_before_flags_are_parsed(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x.py", "--compilation_cache", "/c", "-axis=latent", "--data", "a b"])
    assert [cli.early(name, "none") for name in ("axis", "data", "study")] == ["latent", "a b", "none"]


def test_one_command_starts_every_binary():
    listed = start(sys.executable, "-m", "steel_ad")
    assert listed.returncode == 0, listed.stderr
    assert [line.split()[0] for line in listed.stdout.splitlines()[2:]] == BINARIES
    assert start(sys.executable, "-m", "steel_ad", "--help").stdout == listed.stdout
    assert start(sys.executable, "-m", "steel_ad", "--version").stdout == f"{steel_ad.__version__}\n"
    sentence(start(sys.executable, "-m", "steel_ad", "inspektion"), "no binary 'inspektion'", "inspection", "sweep")
    found = start(sys.executable, "-m", "steel_ad", "inspection", "-h")
    assert found.returncode == 0, found.stderr
    assert "\npython -m steel_ad inspection --model=WORKDIR" in found.stdout
    assert "experiments." not in found.stdout
    sentence(start(sys.executable, "-m", "steel_ad", "inspection"), "--model is missing")


LOSS = """
import jax.numpy as jnp

def error(reconstruction, target, *, power=2):
    return jnp.mean(jnp.abs(reconstruction - target) ** power, axis=(1, 2, 3))
"""


@pytest.mark.slow
def test_a_wheel_works_outside_of_the_clone(tmp_path):
    """In an environment of its own, with this one's other packages, it is `steel_ad` alone, and all of it."""
    source, env = tmp_path / "source", tmp_path / "env"
    for name in ("steel_ad", "experiments", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    files = {p.relative_to(source).as_posix() for p in source.glob("*/**/*") if p.is_file()}
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    built = start(*pip, "wheel", "--quiet", "--no-deps", f"--wheel-dir={tmp_path}", str(source))
    if "No matching distribution" in built.stderr:
        pytest.skip("setuptools cannot be fetched")
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"steel_ad-{steel_ad.__version__}-py3-none-any.whl"
    packed = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert packed == {n if n.startswith("steel_ad/") else f"steel_ad/{n}" for n in files}

    venv.create(env, symlinks=True)
    assert start(*pip, f"--python={env}", "install", "--quiet", "--no-deps", str(wheel)).returncode == 0
    (packages,) = env.glob("lib/python*/site-packages")
    assert sorted(p.name.split("-")[0] for p in packages.iterdir()) == ["steel_ad"] * 2
    (packages / "others.pth").write_text(sysconfig.get_paths()["purelib"])
    (tmp_path / "good").mkdir()
    for i, image in enumerate(np.random.default_rng(0).integers(0, 255, (5, 40, 40), np.uint8)):
        assert cv2.imwrite(str(tmp_path / "good" / f"{i}.png"), image)
    (tmp_path / "my_loss.py").write_text(LOSS)

    def run(*line):
        return start(str(env / "bin" / "steel-ad"), *line, cwd=tmp_path, PYTHONPATH="")

    assert [line.split()[0] for line in run().stdout.splitlines()[2:]] == BINARIES
    assert "\nsteel-ad autoencoder --config=quick" in run("autoencoder", "-h").stdout
    # The loss is the user's own; the processes that read images import the binary again.
    flags = ("--config=tiny", "--config.loss=my_loss:error", "--loss_option=power=1", "--config.data_path=grain")
    flags += ("--data=good", "--workdir=w", f"--compilation_cache={os.environ['STEEL_AD_TEST_CACHE']}")
    first, second = (run("autoencoder", *flags) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert "thresholds only" in first.stdout
    assert second.stdout.startswith("The run in w was finished already.")
    assert json.loads((tmp_path / "w" / "metrics.json").read_text())["finished"] is True
