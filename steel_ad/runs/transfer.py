"""The transfer experiment: from a line with defects to another line's good images (SPEC section 3)."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from steel_ad import config as configs
from steel_ad import files, parallel
from steel_ad.data import datasets
from steel_ad.detectors import segmentation
from steel_ad.runs import segmentation as supervised
from steel_ad.runs.run import Run, location
from steel_ad.train.state import create


def run(
    config: configs.Segmentation,
    *,
    source: str,
    target: str,
    defects_from: str,
    workdir: Path,
    evaluate_only: bool = False,
    load: datasets.Load = datasets.load,
) -> dict[str, Any]:
    """Pretrains on one line, adapts on its mixture with another line's good images, tests both on both.

    Args:
      source: the line with defects; as `datasets.load`'s.
      target: the line with good images only.
      defects_from: as `runs.segmentation.run`'s, for the source line.
      load: as `runs.segmentation.run`'s, for both lines.

    Returns:
      What `metrics.json` holds: `before` and `after`, each with `source` and `target`, each as `runs.segmentation.run` returns.

    Raises:
      InputError: as `runs.segmentation.run`.
    """
    supervised.check(config, evaluate_only=evaluate_only)
    inputs = {"source": location(source), "target": location(target), "defects": defects_from}
    this = Run.begin(workdir, "transfer", config, inputs, evaluate_only=evaluate_only)
    if not evaluate_only and (record := this.finished()):
        return record
    lines = {"source": supervised.load_line(config, source, load), "target": supervised.load_line(config, target, load)}
    samples, used = supervised.samples_of(config, lines["source"], defects_from, [source, target])
    this.claim()
    for where, line in lines.items():
        this.keep(f"{where}/manifest.json", line.manifest, "good images")
        this.keep(f"{where}/defects.json", used, "defects")
    pretrained, pretrain_seconds = supervised.stage_1(this, config, samples, "pretrain", evaluate_only=evaluate_only)
    # Copied, since training donates what it starts from.
    params, extra = jax.tree.map(np.array, parallel.local((pretrained.params, pretrained.extra)))
    start = create(params, segmentation.optimizer(config, config.total_adapt_steps), extra)
    mixture = samples._replace(new_line=lines["target"].training)
    adapted, adapt_seconds = supervised.stage_1(
        this, config, mixture, "adapt", start=start, evaluate_only=evaluate_only
    )
    whole = int(pretrained.step) >= config.total_steps and int(adapted.step) >= config.total_adapt_steps
    result: dict[str, Any] = {"experiment": "transfer", "config": this.settings, "results": this.results_name}
    for name, first, data, seconds in (
        ("before", pretrained, samples, pretrain_seconds),
        ("after", adapted, mixture, pretrain_seconds + adapt_seconds),
    ):
        state, second_seconds, done = supervised.stage_2(
            this, config, data, first, f"classifier_{name}", evaluate_only=evaluate_only
        )
        whole = whole and done
        record = {"experiment": f"transfer, {name}", "train_seconds": seconds + second_seconds}
        result[name] = {
            where: supervised.evaluate(config, state, line, this.results / f"{name}_{where}", record)
            for where, line in lines.items()
        }
    result["finished"] = whole
    files.write_json(this.results / "metrics.json", result)
    return result
