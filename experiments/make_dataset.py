"""Makes data sets: patches of a video, a test set with inserted defects, the thesis' five sets.

python -m experiments.make_dataset from_video --video=plate.avi --out=DIR --size=256
python -m experiments.make_dataset insert --data=procedural/teardrop1 --defects=procedural --out=DIR
python -m experiments.make_dataset thesis --out=DIR

The same command again goes on where it stopped.
"""

import sys
from pathlib import Path

from absl import flags

from steel_ad import cli
from steel_ad.making.settings import FromVideo, Inserted, Thesis

_OUT = flags.DEFINE_string("out", None, "Folder to write: a new one, or one to go on with.")
_VIDEO = flags.DEFINE_string("video", None, "Video of from_video: AVI, MP4, MOV, Matroska, WebM, WMV, MPEG or Y4M.")
_DATA = flags.DEFINE_string(
    "data",
    None,
    "Plates of insert: a folder in the MVTec AD layout, of good images or of a DAGM class, or procedural/LINE.",
)
_DEFECTS = flags.DEFINE_string(
    "defects",
    None,
    "Defects of insert and thesis: a folder of labelled ones on plain steel, or procedural; thesis has procedural by default.",
)
_FROM_VIDEO = cli.Flags(FromVideo, title="settings of from_video")
_INSERT = cli.Flags(Inserted, title="settings of insert")
_THESIS = cli.Flags(Thesis, title="settings of thesis")
_COMMANDS = {
    "from_video": ("out", "video", *_FROM_VIDEO.names),
    "insert": ("out", "data", "defects", *_INSERT.names),
    "thesis": ("out", "defects", *_THESIS.names),
}


def main(command: str) -> None:
    from steel_ad.making import from_video, inserted, thesis

    out = Path(cli.required(_OUT))
    if command == "from_video":
        found = from_video.run(_FROM_VIDEO.value, source=Path(cli.required(_VIDEO)), out=out)
        print(
            f"{found['patches']} patches in {out}, {found['written']} of them new; of {found['frames']} frames, "
            f"{found['blank']} are blank and {found['blurred']} blurred."
        )
        if found["warning"]:
            print(f"warning: {found['warning']}", file=sys.stderr)
        return
    if command == "insert":
        data, defects = cli.required(_DATA), cli.required(_DEFECTS)
        found = inserted.run(_INSERT.value, data=data, defects_from=defects, out=out)
        kinds = ", ".join(f"{count} {kind}" for kind, count in found["kinds"].items())
        print(f"{found['files']} files in {out}, {found['written']} of them new; test images: {kinds}.")
    else:
        found = thesis.run(_THESIS.value, defects_from=_DEFECTS.value or "procedural", out=out)
        print(f"{found['files']} files in {out}, {found['written']} of them new; pictures: {out / 'figures'}.")
    if skipped := found["skipped"]:
        print(
            f"warning: {len(skipped)} defects or files were left out, all named in split.json: {skipped[0]}",
            file=sys.stderr,
        )


if __name__ == "__main__":
    cli.run(main, commands=_COMMANDS)
