"""Production lines of patterned plates: the recipe of a line, and the five that stand in for the thesis'."""

import dataclasses

PATTERNS = ("teardrop_t", "teardrop_a", "diamond")
ANOMALIES = ("dent", "scratch", "missing_lug", "worn_lug", "spot", "smear", "watermark")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """A production line: what its plates, its light and its camera have in common. Lengths and heights are in pixels.

    The lattice's rectangular cell is `pitch_px` across, `pitch_px * tan(angle_deg)` along the strip. Teardrops lie at
    its corners and in its middle, along the one and the other diagonal in turn; diamonds are ribs along both diagonals.
    "+-" is a uniform spread around the line's value, drawn anew for each picture; "std" is a standard deviation within
    a picture.

    Raises:
      ValueError: `pattern` or one of `anomalies` is unknown.
    """

    pattern: str  # one of PATTERNS
    pitch_px: float  # distance of equal lugs across the strip
    angle_deg: float = 45.0  # lugs' angle to the cross direction
    lug_length_px: float  # foot to foot; ribs longer than half a cell diagonal join
    lug_width_px: float  # foot to foot, at the widest
    lug_height_px: float
    flank_px: float  # width of the slope from foot to top: small is a fresh, sharp roll
    wear: float  # 0..1: loss of height and raggedness of the outline, uneven between lugs and regions
    polish: float  # relative gain in reflectance of a lug's top, by traffic and rolls; negative is a dull top
    pitch_jitter: float = 0.015  # +- relative
    rotation_jitter_deg: float = 1.0  # +-
    light_elevation_deg: float  # above the plate; low light draws long flanks
    light_azimuth_deg: float  # 0 from the right, 90 from below
    light_spread_deg: float  # +- azimuth; the elevation moves by a quarter of it
    ambient: float  # 0..1: share of the light that comes from everywhere
    gloss: float  # strength of the mirror-like part; the flat plate has brightness 1
    shininess: float  # sharpness of the highlights
    exposure: float  # 0..1: grey level of a flat, clean plate
    exposure_jitter: float = 0.08  # +- relative
    grain: float  # std of reflectance, relative, in streaks along the strip
    grain_height_px: float  # std of height, in the same direction
    grain_length_px: float  # correlation length of the streaks along the strip
    roughness_px: float  # std of height, without a direction: scale and shot marks
    drift: float  # std of the illumination, relative, over hundreds of pixels
    blotches: float  # 0..1: loss of reflectance in oxide stains
    blotch_cover: float  # 0..1: area share of the stains
    flakes: float  # 0..1: area share of scale flakes, a few pixels each
    blur_px: float  # sigma of the camera's point spread
    noise: float  # std of the camera's noise at white; falls with the root of the brightness
    anomalies: tuple[str, ...] = ANOMALIES[:-1]  # kinds that this line's test pictures can show

    def __post_init__(self):
        if self.pattern not in PATTERNS:
            raise ValueError(f"unknown pattern {self.pattern!r}; there are {', '.join(PATTERNS)}")
        for kind in self.anomalies:
            if kind not in ANOMALIES:
                raise ValueError(f"unknown anomaly kind {kind!r}; there are {', '.join(ANOMALIES)}")


# The numbers by which programs do not lay out their arrays: `render_each` takes them as arrays.
VARIED = tuple(
    field.name
    for field in dataclasses.fields(Line)
    if field.name not in ("pattern", "grain_length_px", "blotch_cover", "flakes", "blur_px", "anomalies")
)

_NAMES = ("teardrop1", "teardrop2", "teardrop3", "teardrop4", "diamond")
# teardrop1: clean, evenly lit, matt. teardrop2: bright and glossy, with blunt, low, densely set lugs. teardrop3: worn and stained,
# with uneven light and uneven lugs. teardrop4: oxidised and dull under uneven light, seen through a lens that gets water on it.
# diamond: crossing ribs, rolled sharp.
_RECIPES = {
    "pattern": ("teardrop_t", "teardrop_a", "teardrop_t", "teardrop_a", "diamond"),
    "pitch_px": (50.0, 40.0, 62.0, 52.0, 48.0),
    "angle_deg": (49.0, 45.0, 45.0, 52.0, 60.0),
    "lug_length_px": (41.0, 26.0, 50.0, 40.0, 60.0),
    "lug_width_px": (13.0, 9.5, 16.0, 13.0, 9.5),
    "lug_height_px": (3.4, 2.0, 3.8, 3.3, 2.6),
    "flank_px": (4.8, 3.2, 5.5, 4.0, 3.4),
    "wear": (0.25, 0.15, 0.45, 0.35, 0.3),
    "polish": (0.12, 0.18, 0.3, -0.15, 0.15),
    "light_elevation_deg": (44.0, 56.0, 50.0, 50.0, 47.0),
    "light_azimuth_deg": (215.0, 300.0, 120.0, 30.0, 200.0),
    "light_spread_deg": (25.0, 25.0, 40.0, 40.0, 30.0),
    "ambient": (0.35, 0.3, 0.35, 0.4, 0.35),
    "gloss": (0.2, 0.55, 0.3, 0.2, 0.3),
    "shininess": (25.0, 45.0, 30.0, 20.0, 30.0),
    "exposure": (0.38, 0.5, 0.42, 0.38, 0.42),
    "exposure_jitter": (0.08, 0.08, 0.15, 0.15, 0.08),
    "grain": (0.035, 0.045, 0.06, 0.05, 0.04),
    "grain_height_px": (0.07, 0.045, 0.08, 0.05, 0.06),
    "grain_length_px": (14.0, 40.0, 22.0, 10.0, 18.0),
    "roughness_px": (0.1, 0.05, 0.12, 0.11, 0.09),
    "drift": (0.06, 0.06, 0.18, 0.2, 0.08),
    "blotches": (0.08, 0.06, 0.22, 0.25, 0.12),
    "blotch_cover": (0.08, 0.05, 0.22, 0.3, 0.1),
    "flakes": (0.003, 0.002, 0.008, 0.008, 0.005),
    "blur_px": (0.7, 0.6, 0.9, 1.0, 0.8),
    "noise": (0.018, 0.02, 0.025, 0.025, 0.02),
    "anomalies": (*[ANOMALIES[:-1]] * 3, ANOMALIES, ANOMALIES[:-1]),
}
LINES: dict[str, Line] = {
    name: Line(**{field: values[i] for field, values in _RECIPES.items()})  # type: ignore[arg-type]
    for i, name in enumerate(_NAMES)
}


def find(line: Line | str) -> Line:
    """The line of a name.

    Raises:
      ValueError: there is none.
    """
    if isinstance(line, Line):
        return line
    if line not in LINES:
        raise ValueError(f"unknown line {line!r}; there are {', '.join(LINES)}")
    return LINES[line]
