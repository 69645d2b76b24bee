"""Settings: a field's comment is its help, its text and its JSON are read back, and recipes are found."""

import dataclasses
import json
import typing
from typing import Annotated, Literal

import pytest

from steel_ad import config as configs
from steel_ad import fields, recipes
from steel_ad.errors import InputError
from steel_ad.making import settings as making
from steel_ad.runs.run import Run

KINDS = [
    value
    for module in (configs, making)
    for value in vars(module).values()
    if isinstance(value, type) and issubclass(value, fields.Settings) and value is not fields.Settings
]
RECIPES = {"autoencoder": configs.Autoencoder, "segmentation": configs.Segmentation, "spectrum": configs.Spectrum}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plain(fields.Settings):
    """Every place that a comment may have."""

    # A header of a part.

    beside: int = 3  # Number beside its comment.
    # Text of which the comment is above,
    # on two lines.
    above: str = "#"
    # Header that does not count.
    both: float = 0.5  # Share, with a header above.
    without: bool = False
    needed: str  # Name that has no default.
    long: tuple[int, ...] = (
        1,
        2,
    )  # Numbers whose default is long.
    rate: Annotated[float | None, "average"] = None  # Rate that may be none.
    either: Literal["a", "b"] = "a"  # Letter.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Derived(Plain):
    """Other defaults, of which one has a comment of its own."""

    beside: int = 4
    both: float = 0.25  # Share of another kind.


def test_the_help_is_the_comment():
    helps = {f.name: f.help for f in fields.fields(Plain)}
    assert helps == {
        "beside": "Number beside its comment.",
        "above": "Text of which the comment is above, on two lines.",
        "both": "Share, with a header above.",
        "without": "",
        "needed": "Name that has no default.",
        "long": "Numbers whose default is long.",
        "rate": "Rate that may be none.",
        "either": "Letter.",
    }
    derived = {f.name: f for f in fields.fields(Derived)}
    assert [derived[n].default for n in ("beside", "both", "above")] == [4, 0.25, "#"]
    assert derived["beside"].help == helps["beside"]
    assert derived["both"].help == "Share of another kind."
    assert derived["needed"].default is dataclasses.MISSING


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_setting_has_a_help_and_a_default_that_its_text_says(kind):
    for field in fields.fields(kind):
        assert field.help[:1].isupper(), field
        assert field.help.endswith("."), field
        assert field.help.split()[0] not in ("Of", "As", "Whose", "Whether", "If"), field
        assert fields.is_a(field.default, field.type), field
        if typing.get_origin(field.type) is not typing.get_origin(typing.Mapping[str, int]):
            assert fields.read(fields.said(field.default, field.type), field.type) == field.default


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        *(("3", int, 3), ("-3", int, -3), ("3.5", int, "3.5"), ("many", int, "many"), ("", int, "")),
        *(("3", float, 3.0), ("1e-3", float, 1e-3), ("x", float, "x")),
        *((t, bool, True) for t in ("true", "True", "t", "1")),
        *((t, bool, False) for t in ("false", "f", "0")),
        *(("yes", bool, "yes"), ("3", str, "3"), ("none", str, "none"), ("a,b", str, "a,b")),
        *((t, tuple[str, ...], ("ssim", "l2")) for t in ("ssim,l2", "('ssim', 'l2')", '["ssim", "l2"]', "ssim, l2,")),
        *(("ssim", tuple[str, ...], ("ssim",)), ("", tuple[str, ...], ()), ("(0.5,1)", tuple[float, ...], (0.5, 1.0))),
        *(("0.5,x", tuple[float, ...], (0.5, "x")), ("a", Literal["a", "b"], "a"), ("c", Literal["a", "b"], "c")),
        *(("none", int | None, None), ("4", int | None, 4), ("average", int | None, "average")),
        *((t, Annotated[float | None, "average"], v) for t, v in (("average", None), ("0.95", 0.95), ("none", "none"))),
    ],
)
def test_a_text_is_read_by_its_fields_type(text, kind, value):
    found = fields.read(text, kind)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"beside": True}, "--beside=true must be a whole number below 2"),
        ({"above": None}, "--above= must be text"),
        ({"without": 1}, "--without=1 must be true or false"),
        ({"long": (1, 2.5)}, "--long=1,2.5 must be a list, each of it a whole number"),
        ({"long": 1}, "--long=1 must be a list"),
        ({"rate": "high"}, "--rate=high must be average or a finite number"),
        ({"rate": float("inf")}, "--rate=inf must be average or a finite number"),
        ({"either": "c"}, "--either=c must be one of a, b"),
    ],
)
def test_a_value_of_another_type_is_refused_when_it_is_made(changes, said):
    with pytest.raises(InputError, match=f"^{said}"):
        Plain(**{"needed": "x", **changes})


def test_what_is_missing_or_unknown_is_named():
    assert configs.from_mapping(Plain, {"needed": "x", "long": [3]}) == Plain(needed="x", long=(3,))
    with pytest.raises(InputError, match=r"^--needed is missing"):
        configs.from_mapping(Plain, {"beside": 1})
    with pytest.raises(InputError, match=r"no setting 'nedeed': the settings are .*needed"):
        configs.from_mapping(Plain, {"nedeed": "x"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("latent", v) for v in ("8", 8.0, True, None, [8], 10**30)),
        *(("learning_rate", v) for v in (float("nan"), float("inf"), "1", False, 10**400)),
        *(("flips", v) for v in (0, "no")),
        *(("maps", v) for v in ("ssim", 3, ["ssim", 1], [["l2"]], {"ssim": 1}, [], ["ssim", "l3"])),
        *(("loss", v) for v in (1, ["ssim"], None)),
        *(("loss_options", 3), ("dtype", "float16"), ("schedule", ["cosine"])),
        *(("patch_size", 40), ("validation_fraction", 0.0), ("validation_fraction", 1.0), ("percentile", 100.5)),
        *(("learning_rate", 0.0), ("stride", 256), ("window_size", 129), ("checkpoint_every", 0), ("radius", -1)),
    ],
)
def test_a_setting_is_refused_under_its_flags_name(name, value):
    with pytest.raises(InputError, match=rf"^--config\.{name}="):
        configs.from_mapping(configs.Autoencoder, {name: value})


def test_numbers_without_a_point_are_numbers():
    assert configs.from_mapping(configs.Autoencoder, {"learning_rate": 1, "maps": ["l2"]}).maps == ("l2",)


@pytest.mark.parametrize("value", [float("inf"), {1, 2}, 1j, [float("nan")], b"x"])
def test_an_option_of_the_loss_that_no_file_can_hold_is_refused(value):
    with pytest.raises(InputError, match="--loss_option takes finite numbers, text"):
        configs.Segmentation(loss_options={"a": value})


@pytest.mark.parametrize("options", [{"sizes": (3, 5)}, {"sizes": [3, 5]}, {"a": ((1, [2]), {"b": (0.5,)})}, {}])
def test_settings_are_the_same_after_a_file(options, tmp_path):
    """JSON has lists where Python and --loss_option=sizes=(3,5) have tuples, at any depth."""
    config = configs.Autoencoder(loss_options=options, maps=("l2",))
    recorded = json.loads(json.dumps(configs.to_dict(config)))
    assert configs.difference(configs.to_dict(config), recorded) is None
    again = configs.from_mapping(configs.Autoencoder, recorded)
    assert configs.to_dict(again) == recorded
    assert configs.canonical(again) == configs.canonical(config) == configs.canonical(recorded)
    # A second start of the same command goes on with the run.
    for _ in range(2):
        Run.begin(tmp_path / "w", "autoencoder", config, {"data": "x"}, evaluate_only=False).claim()
    other = dataclasses.replace(config, loss_options={**options, "sizes": (3, 6)})
    with pytest.raises(InputError, match="differs in loss_options"):
        Run.begin(tmp_path / "w", "autoencoder", other, {"data": "x"}, evaluate_only=False)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_preset_is_in_its_table_and_can_be_changed(recipe):
    kind, presets = RECIPES[recipe], recipes.presets(recipe)
    table = recipes.table(recipes.place("x", recipe)[0]).splitlines()
    assert table[0].split() == ["preset", "what", "cost", "on", "2", "CPU", "cores"]
    assert {line.split()[0] for line in table[1:]} == set(presets)
    for preset, settings in presets.items():
        assert configs.from_mapping(kind, recipes.load(preset, recipe)) == kind(**settings)


OWN = """
from configs import autoencoder

def get_config(preset="small"):
    if preset == "broken":
        raise RuntimeError("no such thing")
    config = autoencoder.get_config("tiny")
    config.latent = {"small": 4, "large": 9}[preset]
    config.loss_options.weight = 0.25
    if preset == "large":
        config.maps = ("l2",)
    return config
"""


def test_a_recipe_of_ones_own(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    tiny = configs.Autoencoder(**recipes.presets("autoencoder")["tiny"])
    for text, changes in ((f"{path}", {"latent": 4}), (f"{path}:large", {"latent": 9, "maps": ("l2",)})):
        found = configs.from_mapping(configs.Autoencoder, recipes.load(text, "autoencoder"))
        assert found == dataclasses.replace(tiny, loss_options={"weight": 0.25}, **changes)
    for text, said in (
        (f"{path}:broken", "RuntimeError: no such thing"),
        (f"{path}:medium", "KeyError: 'medium'"),
        (f"{tmp_path}/none.py:x", "there is no file"),
        (f"{tmp_path}/none.py", "there is no file"),
    ):
        with pytest.raises(InputError, match=f"^--config={text}.*{said}"):
            recipes.load(text, "autoencoder")
    for content in ("x = 1", "def get_config(:", "def get_config(): return 3"):
        path.write_text(content)
        with pytest.raises(InputError, match=r"cannot be loaded .*get_config\(preset\)"):
            recipes.load(str(path), "autoencoder")
    with pytest.raises(InputError, match=r"no preset 'quik': use one of thesis, quick, demo, tiny, or FILE\.py:PRESET"):
        recipes.load("quik", "autoencoder")
    with pytest.raises(AttributeError, match="latnt"):
        recipes.of(configs.Autoencoder, {"a": {}}, "a").latnt = 3
