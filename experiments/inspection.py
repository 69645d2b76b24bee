"""Inspects images or a line-scan video with a trained model: a list of defects, a map of the coil, a report.

python -m experiments.inspection --model=WORKDIR --source=FOLDER|VIDEO.avi|IMAGE|CAMERAS.json --out=DIR \\
    --calibration=FOLDER --false_alarm_rate=0.01

Exit status 0: clean, 3: defects found, 1 or 2: an error; 1 also after the report on a video that is cut short. The same command
again goes on where it stopped.

With --watch the folder is one that a camera writes to. Every image is inspected once, when it is whole, the report is kept up to
date, and Ctrl-C, SIGTERM or --watch_idle_s end it with the report and the same status; started again it goes on. In the end the
ledger is that of one inspection of the same images, in whatever pieces of time they came. Images that cannot be read are named, and
with --strip those that come out of the order of their names, and the rest goes on; the status is 1 then.
"""

from pathlib import Path

from absl import flags

from steel_ad import cli

_MODEL = flags.DEFINE_string("model", None, "Workdir of a run of experiments.autoencoder or experiments.segmentation.")
_SOURCE = flags.DEFINE_string(
    "source",
    None,
    "Image, folder of images, video (one endless strip), or JSON list of cameras (name, source, side, ...).",
)
_OUT = flags.DEFINE_string("out", None, "Folder to write: a new one, or one to go on with.")
_CALIBRATION = flags.DEFINE_string(
    "calibration",
    "",
    "Folder of good images, those of a subfolder of one strip; without it the training run's threshold, and no promise.",
)
_MAP = flags.DEFINE_string("map", "", "Of an autoencoder: ssim or l2 (the run's first).")
_TILE = flags.DEFINE_integer("tile_px", 256, "Side of a tile, the unit of calibration and of inspection, in pixels.")
_HALO = flags.DEFINE_integer("halo_px", 64, "Surroundings of a tile that the detector sees, on each side, in pixels.")
_RATE = flags.DEFINE_float("false_alarm_rate", 0.01, "Share of good tiles that may raise an alarm.")
_CONFIDENCE = flags.DEFINE_string(
    "confidence", "average", "average: the rate holds on average over calibrations; 0.95: with that confidence."
)
_PER_M2 = flags.DEFINE_float(
    "false_alarms_per_m2", 0.0, "Tiles with a false alarm per square metre, by a model of the tail; needs --mm_per_px."
)
_SCALE = flags.DEFINE_float("mm_per_px", 0.0, "Size of a pixel on the plate (0: not known).")
_STRIP = flags.DEFINE_bool("strip", False, "The images of the folder follow each other along one strip.")
_PITCH = flags.DEFINE_float("pitch_mm", 0.0, "Pitch of the plate's pattern along the strip (0: not known).")
_WATCH = flags.DEFINE_bool("watch", False, "Follow the folder that a camera writes to.")
_IDLE = flags.DEFINE_float(
    "watch_idle_s", 0.0, "End after so many seconds without a new image (0: never).", lower_bound=0
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws of calibration and recurrence.")


def main() -> int:
    from steel_ad import config as configs
    from steel_ad.errors import InputError
    from steel_ad.inspection import good_tiles
    from steel_ad.inspection import session as inspection
    from steel_ad.runs.run import Run

    try:
        confidence = None if _CONFIDENCE.value == "average" else float(_CONFIDENCE.value)
    except ValueError:
        raise InputError(f"--confidence={_CONFIDENCE.value} must be average or a number such as 0.95") from None
    if not _CALIBRATION.value and _RATE.present:
        raise InputError("--false_alarm_rate is a promise from good images: give --calibration=FOLDER")
    if _IDLE.present and not _WATCH.value:
        raise InputError(f"--watch_idle_s={_IDLE.value:g} is for a folder that is followed: give --watch")
    config = configs.Inspection(
        map=_MAP.value,
        tile_px=_TILE.value,
        halo_px=_HALO.value,
        false_alarm_rate=_RATE.value,
        confidence=confidence,
        false_alarms_per_m2=_PER_M2.value,
        mm_per_px=_SCALE.value,
        strip=_STRIP.value,
        pitch_mm=_PITCH.value,
        seed=_SEED.value,
    )
    model, source, out = (cli.required(holder) for holder in (_MODEL, _SOURCE, _OUT))
    found = inspection.run(
        config,
        Run.open(Path(model)).detector(config.map),
        source=source,
        calibrate_on=_CALIBRATION.value,
        out=Path(out),
        watch_idle_s=_IDLE.value if _WATCH.value else None,
    )
    print(good_tiles.promise_sentence(found["calibration"]))
    for roll in found["recurrence"]:
        print(f"{roll['side']}: {roll['sentence']}")
    print(f"Defects: {found['defects']}; {found['tiles_with_an_alarm']} of {found['tiles']} tiles with an alarm.")
    print(f"Report: {Path(out) / 'report.html'}; list: {Path(out) / 'ledger.csv'}")
    if waiting := found.get("watched", {}).get("waiting"):
        print(f"Not inspected yet: {', '.join(waiting)}; the same command goes on.")
    if found["unread"]:
        raise InputError(" ".join(found["unread"]), status=1)
    return 3 if found["defects"] else 0


if __name__ == "__main__":
    cli.run(main)
