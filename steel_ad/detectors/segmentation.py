"""CompactCNN and U-Net, with the classification stage behind either, as detectors (SPEC section 2)."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from steel_ad import config as configs
from steel_ad import losses, models
from steel_ad.data import datasets, defects, light, patches
from steel_ad.data.datasets import TestImage
from steel_ad.data.defects import Library
from steel_ad.data.images import Images
from steel_ad.data.patches import Crops, Plates
from steel_ad.detectors import Detector
from steel_ad.models import compact_cnn
from steel_ad.train import checkpoint, feed, optimizers
from steel_ad.train.feed import Set
from steel_ad.train.fit import fit
from steel_ad.train.stage import Stage
from steel_ad.train.state import TrainState, create, first, stream


class Samples(NamedTuple):
    """What a stage is trained on; every field but `good` may be None.

    Attributes:
      good: the line's good images.
      library: defects to insert into them.
      altered: share of the defective samples that are alterations of the good images (`defects.alter`), `[]` in 0..1: 1 where
        there is no library.
      labelled: defective training images; `masks` are theirs, 0 and 1; `marks` int32 `[n, k, 2]` are k places (row, column)
        of defective pixels of each.
      new_line: good images of another line, mixed in while adapting.
      frozen: variables of the segmentation stage, which the classification stage learns behind.
    """

    good: Set
    library: Library | None = None
    altered: Array | float | None = None
    labelled: Set | None = None
    masks: Set | None = None
    marks: Array | np.ndarray | None = None
    new_line: Set | None = None
    frozen: Any = None


class Batch(NamedTuple):
    """`image` float32 `[b, p, p, 1]` in [0, 1]; `mask` float32 `[b, p, p, 1]`, 0 or 1; `label` float32 `[b]`, 0 or 1."""

    image: Array
    mask: Array
    label: Array


def choose(config: configs.Segmentation, share: float, data: Samples, step: Array, root: Array) -> dict[str, Crops]:
    """Where the patches of a step are, of each sample in one set and its mask: see `train.stage.Stage`.

    Where there are labelled images and no library, a sample is a patch of one around a defective pixel with probability `share`.
    Where there is a new line, a sample is one of its good ones with probability `config.new_line`, whatever it was.
    """

    def crops(name: str, images: Any) -> Crops:
        key = stream(root, name, step)
        return patches.random_crops(key, images.sizes, num=config.batch_size, patch_size=config.patch_size)

    def chance(name: str, of_one: float) -> Array:
        return jax.random.bernoulli(stream(root, name, step), of_one, (config.batch_size, 1, 1, 1))[:, 0, 0, 0]

    def only(chosen: Array, crops: Crops) -> Crops:
        return crops._replace(image=jnp.where(chosen, crops.image, -1))

    places = {"good": crops("crops", data.good)}
    if data.library is None and data.labelled is not None:
        defective = chance("chosen", share)
        marked = only(defective, _around_a_mark(config, data.labelled, data.marks, stream(root, "labelled", step)))
        places = {"good": only(~defective, places["good"]), "labelled": marked, "masks": marked}
    if data.new_line is not None:
        new = chance("line", config.new_line)
        if data.altered is None:  # otherwise every good patch is another sample's other plate
            places = {name: only(~new, at) for name, at in places.items()}
        places["new_line"] = only(new, crops("new line", data.new_line))
    return places


def _around_a_mark(config: configs.Segmentation, images: Any, marks: Any, key: Array) -> Crops:
    """Places of patches, each holding a random mark of a random image."""
    of_image, of_mark, of_place = jax.random.split(key, 3)
    image = jax.random.randint(of_image, (config.batch_size,), 0, marks.shape[0])
    mark = jnp.asarray(marks)[image, jax.random.randint(of_mark, image.shape, 0, marks.shape[1])]
    last = jnp.asarray(images.sizes)[image] - config.patch_size
    corner = mark - jax.random.randint(of_place, mark.shape, 0, config.patch_size)
    top, left = jnp.clip(corner, jnp.zeros_like(last), last).T
    return Crops(image, top, left)


def draw(config: configs.Segmentation, share: float, data: Samples, step: Array, root: Array) -> Batch:
    """A batch of the patches that `choose` chooses, good ones flipped and with defects inserted; pure and jittable.

    With a library or alterations, a good sample is made a defective one with probability `share`. The light of every sample changes
    by `config.light`.
    """
    places = choose(config, share, data, step, root)
    pixels = feed.cut(data, places, patch_size=config.patch_size)
    image = patches.scaled(pixels["good"])
    if config.flips:
        image = patches.random_flips(stream(root, "flips", step), image)
    good, mask = image, jnp.zeros_like(image)
    if data.library is not None:
        image, inserted = defects.insert(
            stream(root, "defects", step),
            image,
            data.library,
            max_defects=config.max_defects,
            probability=share,
            blend=config.blend,
            augment=config.augment,
        )
        mask = inserted.astype(jnp.float32)
    if data.altered is not None:
        others = jnp.roll(good, 1, axis=0)
        key = stream(root, "alterations", step)
        altered, changed = defects.alter(key, good[..., 0], others[..., 0], most=config.max_defects, probability=share)
        chosen = jax.random.bernoulli(stream(root, "altered", step), data.altered, (config.batch_size, 1, 1, 1))
        image = jnp.where(chosen, altered[..., None], image)
        mask = jnp.where(chosen, changed.astype(jnp.float32)[..., None], mask)
    for name in ("labelled", "new_line"):
        if name in places:
            chosen = (places[name].image >= 0)[:, None, None, None]
            marked = pixels["masks"].astype(jnp.float32)[..., None] if name == "labelled" else jnp.zeros_like(mask)
            image, mask = jnp.where(chosen, patches.scaled(pixels[name]), image), jnp.where(chosen, marked, mask)
    if config.light:
        image = light.changed(stream(root, "light", step), image[..., 0], strength=config.light)[..., None]
    return Batch(image, mask, jnp.any(mask > 0.5, axis=(1, 2, 3)).astype(jnp.float32))


def labelled(good: Plates | Images, defective: Sequence[TestImage], *, seed: int, marks: int = 64) -> Samples:
    """Samples of good images and of defective ones with masks."""
    rng = np.random.default_rng([seed, 0x3A])
    places = np.array([rng.choice(np.argwhere(t.mask), marks) for t in defective], np.int32)
    images, masks = datasets.images_of(defective), datasets.masks_of(defective)
    return Samples(good, labelled=images, masks=masks, marks=places)


def network(config: configs.Segmentation) -> Any:
    """The segmentation network of these settings: images `[b, h, w, 1]` to features and logits."""
    return models.build(models.SEGMENTERS, config)


def _classifier(config: configs.Segmentation) -> compact_cnn.Classifier:
    return compact_cnn.Classifier(dtype=jnp.dtype(config.dtype))


def optimizer(config: configs.Segmentation, total_steps: int) -> optax.GradientTransformation:
    """Adadelta with a library's default settings, or Adam with a schedule."""
    if config.optimizer == "adadelta":
        return optimizers.clipped(optimizers.adadelta(config.adadelta), config)
    return optimizers.clipped(optax.adam(optimizers.schedule(config, total_steps)), config)


def segmentation_objective(config: configs.Segmentation):
    """Objective of stage 1 for `train.step.make_step`; `data` is Samples."""
    model = network(config)
    loss = losses.get(config.loss, config.loss_options, losses.SEGMENTATION_LOSSES)
    share = configs.defective_share(config.ratio)

    def objective(params, extra, data, step, root):
        batch = draw(config, share, data, step, root)
        (_, logits), updated = model.apply(
            {"params": params, **extra}, batch.image, train=True, mutable=["batch_stats"]
        )
        return loss(logits, _reduced(batch.mask, logits.shape)).mean(), (dict(updated), {})

    return objective


def classifier_objective(config: configs.Segmentation):
    """Objective of stage 2; `data` is Samples with the variables of stage 1."""
    model, stage_1 = _classifier(config), network(config)
    activation = losses.activation(config.loss)
    share = configs.defective_share(config.classifier_ratio)

    def objective(params, extra, data, step, root):
        batch = draw(config, share, data, step, root)
        features, logits = stage_1.apply(data.frozen, batch.image)
        logit, updated = model.apply(
            {"params": params, **extra}, features, activation(logits), train=True, mutable=["batch_stats"]
        )
        loss = jnp.mean(optax.sigmoid_binary_cross_entropy(logit, batch.label))
        accuracy = jnp.mean(((logit > 0) == (batch.label > 0.5)).astype(jnp.float32))
        return loss, (dict(updated), {"accuracy": accuracy})

    return objective


def _reduced(mask: Array, shape: tuple[int, ...]) -> Array:
    """The mask reduced by area to the map's height and width."""
    b, h, w, c = mask.shape
    k = h // shape[1]
    return mask.reshape(b, h // k, k, w // k, k, c).mean(axis=(2, 4))


def initial_segmentation(config: configs.Segmentation, total_steps: int) -> TrainState:
    """Stage 1 before its first step."""
    x = jnp.zeros((1, config.patch_size, config.patch_size, 1))

    def make(key):
        params, extra = _split(network(config).init(key, x))
        return create(params, optimizer(config, total_steps), extra)

    return first(make, stream(jax.random.key(config.seed), "init segmentation"))


def initial_classifier(config: configs.Segmentation, frozen: Any) -> TrainState:
    """Stage 2 before its first step, behind stage 1 with the variables `frozen`."""
    x = jnp.zeros((1, config.patch_size, config.patch_size, 1))

    def make(key):
        params, extra = _split(_classifier(config).init(key, *network(config).apply(frozen, x)))
        return create(params, optimizer(config, config.total_classifier_steps), extra)

    return first(make, stream(jax.random.key(config.seed), "init classifier"))


def _split(variables: Any) -> tuple[Any, dict]:
    variables = dict(variables)
    return variables.pop("params"), variables


def variables(state: TrainState) -> dict:
    """The network's variables in a training state."""
    return {"params": state.params, **state.extra}


@functools.lru_cache(maxsize=16)
def stage(config: configs.Segmentation, steps: int, *, classifier: bool = False) -> Stage:
    """What training the segmentation stage, or the classification stage, is; the settings' seed does not matter."""
    objective = classifier_objective if classifier else segmentation_objective
    share = configs.defective_share(config.classifier_ratio if classifier else config.ratio)
    return Stage(
        objective=objective(config),
        optimizer=optimizer(config, steps),
        choose=functools.partial(choose, config, share),
        steps=steps,
        batch_size=config.batch_size,
        patch_size=config.patch_size,
        checkpoint_every=config.checkpoint_every,
    )


def train(what: Stage, data: Samples, state: TrainState, *, seed: int, name: str, **options: Any) -> TrainState:
    """`train.fit.fit` with `options`; every stage, by its `name`, draws samples of its own."""
    return fit(what, data, state, stream(jax.random.key(seed), name), **options)


def _padded(image: Array) -> Array:
    """`[h, w]` -> `[1, h', w', 1]`, both sides multiples of 16 by reflection at the end."""
    h, w = image.shape
    return jnp.pad(image, ((0, -h % 16), (0, -w % 16)), mode="reflect")[None, :, :, None]


@dataclasses.dataclass(frozen=True)
class SegmentationDetector(Detector):
    """The segmentation map as residual: tanh or sigmoid of the logits, a smaller one enlarged bilinearly.

    The state has the variables of "segmenter" and, where that stage is trained, of "classifier".

    Attributes:
      library: defects that `fit` inserts; None: alterations of the good images.
      stages: names of the stages of a run that `restore` reads, segmentation and classification.
    """

    config: configs.Segmentation
    library: Library | None = None
    stages: tuple[str, str] = ("train", "classifier")

    name = "segmentation"
    least_px = 16

    @property
    def side_multiple(self) -> int:  # type: ignore[override]
        # A network with tiles, such as CompactCNN's, finds their places while it is traced.
        return getattr(network(self.config), "side_multiple", 0)

    def fit(self, images: Sequence[np.ndarray]) -> Any:
        """The segmentation stage trained on good images with defects inserted."""
        config = self.config
        what = stage(dataclasses.replace(config, seed=0), config.total_steps)
        start = initial_segmentation(config, config.total_steps)
        samples = Samples(Images(images), self.library, altered=1.0 if self.library is None else None)
        trained = train(what, samples, start, seed=config.seed, name="train")
        return {"segmenter": variables(trained)}

    def residual(self, state: Any, image: Array) -> Array:
        """Map `[h, w]` of an image `[h, w]` of any size from 16x16."""
        padded = _padded(image)
        _, map_ = self._features_and_map(state, padded)
        found = map_[0, :, :, 0]
        if found.shape != padded.shape[1:3]:
            found = jax.image.resize(found, padded.shape[1:3], "bilinear", antialias=False)
        return found[: image.shape[0], : image.shape[1]]

    def probability(self, state: Any, image: Array) -> Array | None:
        if "classifier" not in state:
            return None
        logit = _classifier(self.config).apply(state["classifier"], *self._features_and_map(state, _padded(image)))
        return jax.nn.sigmoid(jnp.asarray(logit)[0])

    def _features_and_map(self, state: Any, padded: Array) -> tuple[Array, Array]:
        features, logits = network(self.config).apply(state["segmenter"], padded)
        return features, losses.activation(self.config.loss)(logits)

    def restore(self, folder: Path) -> Any:
        """The stages' newest checkpoints of a run in `folder`; without a classifier where that has not begun."""
        first, second = (stage_folder(folder, stage) for stage in self.stages)
        like = jax.eval_shape(lambda: initial_segmentation(self.config, self.config.total_steps))
        state = {"segmenter": variables(checkpoint.newest(first, like))}
        if second.is_dir():
            like = jax.eval_shape(lambda: initial_classifier(self.config, state["segmenter"]))
            state["classifier"] = variables(checkpoint.newest(second, like))
        return state


def stage_folder(workdir: Path, stage: str) -> Path:
    """Where a run keeps the checkpoints of a stage."""
    return workdir / ("checkpoints" if stage == "train" else f"checkpoints_{stage}")
