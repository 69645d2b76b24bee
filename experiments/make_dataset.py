"""Makes data sets: patches of a video, a test set with inserted defects, the thesis' five sets.

python -m experiments.make_dataset from_video --video=plate.avi --out=DIR --size=256
python -m experiments.make_dataset insert --data=procedural/teardrop1 --defects=procedural --out=DIR
python -m experiments.make_dataset thesis --out=DIR

The same command again goes on where it stopped.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from absl import flags

from steel_ad import cli
from steel_ad import config as configs
from steel_ad.making.settings import FromVideo, Inserted, Thesis

_OUT = flags.DEFINE_string("out", None, "Folder to write: a new one, or one to go on with.")
_FLAGS: dict[str, flags.FlagHolder] = {
    "seed": flags.DEFINE_integer("seed", None, "Of everything drawn (0)."),
    "video": flags.DEFINE_string("video", None, "from_video: AVI, MP4, MOV, Matroska, WebM, WMV, MPEG or Y4M."),
    "size": flags.DEFINE_integer("size", None, "from_video: height and width of a patch in pixels (256)."),
    "positions": flags.DEFINE_string("positions", None, "from_video: grid, edge to edge, or random (grid)."),
    "per_frame": flags.DEFINE_integer("per_frame", None, "from_video, --positions=random: patches of a frame (4)."),
    "min_contrast": flags.DEFINE_float(
        "min_contrast", None, "from_video: a frame whose standard deviation is below it, in grey levels, is blank (4)."
    ),
    "min_sharpness": flags.DEFINE_float(
        "min_sharpness", None, "from_video: a frame less sharp than this share of the frames' median is blurred (0.6)."
    ),
    "data": flags.DEFINE_string(
        "data", None, "insert: folder in the MVTec AD layout, of good images or of a DAGM class, or procedural/LINE."
    ),
    "defects": flags.DEFINE_string(
        "defects",
        None,
        "insert, thesis: folder of labelled defects on plain steel, or procedural (thesis: procedural).",
    ),
    "num_test": flags.DEFINE_integer(
        "num_test",
        None,
        "insert: good test images, and as many defective ones (100); thesis: test images in all (200).",
    ),
    "test_fraction": flags.DEFINE_float(
        "test_fraction", None, "insert: share of each kind's defect images that is for the test set (0.3)."
    ),
    "blend": flags.DEFINE_string("blend", None, "insert: difference or paste (difference)."),
    "augment": flags.DEFINE_string("augment", None, "insert: thesis or strong (thesis)."),
    "lines": flags.DEFINE_list("lines", None, "thesis: lines, comma-separated (all five)."),
    "num_train": flags.DEFINE_integer("num_train", None, "thesis: good training images of each line (2000)."),
}
_COMMANDS: dict[str, tuple[Any, ...]] = {
    "from_video": (FromVideo, "video"),
    "insert": (Inserted, "data", "defects"),
    "thesis": (Thesis, "defects"),
}


def main(command: str) -> None:
    from steel_ad.errors import InputError
    from steel_ad.making import from_video, inserted, thesis

    kind, *inputs = _COMMANDS[command]
    known = [*inputs, *(field.name for field in dataclasses.fields(kind))]
    given: dict[str, Any] = {name: flag.value for name, flag in _FLAGS.items() if flag.present}
    if unused := [name for name in given if name not in known]:
        raise InputError(f"--{unused[0]} is not a flag of {command}, which has --out, --{', --'.join(known)}")
    out = Path(cli.required(_OUT))
    config: Any = kind(**{name: configs.plain(value) for name, value in given.items() if name not in inputs})
    if command == "from_video":
        found = from_video.run(config, source=Path(cli.required(_FLAGS["video"])), out=out)
        print(
            f"{found['patches']} patches in {out}, {found['written']} of them new; of {found['frames']} frames, "
            f"{found['blank']} are blank and {found['blurred']} blurred."
        )
        if found["warning"]:
            print(f"warning: {found['warning']}", file=sys.stderr)
        return
    if command == "insert":
        data, defects = cli.required(_FLAGS["data"]), cli.required(_FLAGS["defects"])
        found = inserted.run(config, data=data, defects_from=defects, out=out)
        kinds = ", ".join(f"{count} {kind}" for kind, count in found["kinds"].items())
        print(f"{found['files']} files in {out}, {found['written']} of them new; test images: {kinds}.")
    else:
        found = thesis.run(config, defects_from=given.get("defects", "procedural"), out=out)
        print(f"{found['files']} files in {out}, {found['written']} of them new; pictures: {out / 'figures'}.")
    if skipped := found["skipped"]:
        print(
            f"warning: {len(skipped)} defects or files were left out, all named in split.json: {skipped[0]}",
            file=sys.stderr,
        )


if __name__ == "__main__":
    cli.run(main, commands=tuple(_COMMANDS))
