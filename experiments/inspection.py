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
from steel_ad import config as configs

_MODEL = cli.define_model()
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
_WATCH = flags.DEFINE_bool("watch", False, "Watch of a folder that a camera writes to.")
_IDLE = flags.DEFINE_float(
    "watch_idle_s", 0.0, "Seconds without a new image after which the watch ends (0: never).", lower_bound=0
)
_SETTINGS = cli.Flags(configs.Inspection)


def main() -> int:
    from steel_ad.errors import InputError
    from steel_ad.inspection import good_tiles
    from steel_ad.inspection import session as inspection
    from steel_ad.runs.run import Run

    if not _CALIBRATION.value and "false_alarm_rate" in _SETTINGS.given:
        raise InputError("--false_alarm_rate is a promise from good images: give --calibration=FOLDER")
    if _IDLE.present and not _WATCH.value:
        raise InputError(f"--watch_idle_s={_IDLE.value:g} is for a folder that is followed: give --watch")
    model, source, out = (cli.required(holder) for holder in (_MODEL, _SOURCE, _OUT))
    found = inspection.run(
        _SETTINGS.value,
        Run.open(Path(model)).detector(_SETTINGS.value.map),
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
