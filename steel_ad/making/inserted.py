"""A fixed test set: good plates, and others with defects inserted, with their masks."""

import collections
import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from steel_ad.data import datasets, defects
from steel_ad.errors import InputError
from steel_ad.making import batches, writing
from steel_ad.making.settings import Inserted

_PROCEDURAL_TRAIN = 300


def run(config: Inserted, *, data: str, defects_from: str, out: Path) -> dict[str, Any]:
    """Writes a set in the MVTec AD layout: `train/good`, `test/good`, `test/<kind>`, `ground_truth/<kind>/*_mask.png`.

    The defects of the test images come from source images that `defects.split` keeps for testing; `split.json` names the
    sources of both sides by SHA-256, so that training can leave the test's out. Kinds take turns, and so do the defects of
    a kind. Test plates are the source's good test images, as far as there are enough, and else held out from its good
    training images; none of equal content is in train/good. The columns of `manifest.csv` are file, plate, defect (the source
    image), defect_index (in the test library) and sha256.

    Args:
      config: the settings.
      data: as `datasets.load`; procedural/LINE gives 300 plates to train and as many as it takes to test.
      defects_from: folder of labelled defects on plain steel (`defects.load`), or "procedural" for 240 drawn ones.
      out: a new folder, or one to go on with.

    Returns:
      Numbers of files in all (`files`), of those `written` now, of test images by kind (`kinds`), and `skipped`: a sentence
      for each defect that cannot be used.

    Raises:
      InputError: data or defects that cannot be used, too few plates, a source on both sides, `out` of other settings, or,
        with status 1, a full disk.
    """
    num, seed = config.num_test, config.seed
    if data.startswith("procedural/") and not Path(data).is_dir():
        line = data.removeprefix("procedural/")
        batches.check_lines([line])
        wanted = (("train", _PROCEDURAL_TRAIN), ("good", num), ("defective", num))
        train, good, bad = (batches.rendered(line, seed, name, count) for name, count in wanted)
        source, smallest = data, (batches.SIZE_PX, batches.SIZE_PX)
    else:
        dataset = datasets.load(data)
        kept, held = _hold_out(data, dataset, 2 * num, seed)
        train, good, bad = (_loaded(named) for named in (kept, held[:num], held[num:]))
        source = batches.digest(row["sha256"] for row in dataset.manifest)
        heights, widths = zip(*(image.shape for _, image in held), strict=True)
        smallest = min(heights), min(widths)
    library, record = batches.test_side(defects_from, config.test_fraction, seed)
    library, too_large = defects.fitting(library, smallest)
    record["skipped"] += too_large
    used = {"data": source, "defects": batches.digest(library.sha256)}
    settings = {"command": "insert", **used, **dataclasses.asdict(config)}
    counter: collections.Counter[str] = collections.Counter()
    order, key = batches.in_turn(library, seed), batches.stream(seed, "insert")
    how = {"blend": config.blend, "augment": config.augment}
    plan = writing.Plan(
        out=out,
        records={"settings.json": settings, "split.json": record},
        batches=[
            *batches.good("train/good", train),
            *batches.good("test/good", good),
            *batches.inserted(bad, library, order, counter, key, **how),
        ],
    )
    writing.check(out, settings)
    written = writing.complete([plan])
    kinds = {"good": num, **counter}
    return {"files": len(plan.rows), "written": written, "kinds": kinds, "skipped": record["skipped"]}


def _loaded(named: list[tuple[str, np.ndarray]]) -> list[batches.Plates]:
    return batches.grouped([name for name, _ in named], lambda a, b: [image for _, image in named[a:b]])


def _hold_out(data: str, dataset: datasets.Dataset, count: int, seed: int) -> tuple[list, list]:
    """(name, image) of the plates to train on and of `count` to test on, no content in both."""

    def unique(named):
        return {
            hashlib.sha256(repr(image.shape).encode() + image.tobytes()).digest(): (name, image)
            for name, image in named
        }

    test = unique((f"test/{t.name}", t.image) for t in dataset.test if not t.defective)
    train = unique(zip((row["path"] for row in dataset.manifest), dataset.train, strict=True))
    rng = np.random.default_rng([seed, 0x7E57])
    pool = [list(group)[i] for group in (test, train) for i in rng.permutation(len(group))]
    held = list(dict.fromkeys(pool))[:count]
    # Without this, good and defective plates would differ in where they are from.
    held = [held[i] for i in rng.permutation(len(held))]
    left = [named for content, named in train.items() if content not in set(held)]
    if len(held) < count or 2 * len(left) < len(train):
        raise InputError(
            f"{data} has {len(train)} different good images to train on and {len(test)} to test on, too few for "
            f"--num_test={count // 2}, which takes {count} and leaves half of the former: use a smaller --num_test"
        )
    return left, [(test.get(content) or train[content]) for content in held]
