"""CompactCNN and U-Net, with the classification stage behind either, as detectors (SPEC section 2)."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh

from steel_ad import config as configs
from steel_ad import losses, parallel
from steel_ad.data import defects, patches
from steel_ad.data.defects import Library
from steel_ad.data.patches import Crops, Plates
from steel_ad.models import compact_cnn, unet
from steel_ad.train import loop, optimizers
from steel_ad.train.state import TrainState, create, stream
from steel_ad.train.step import make_step, steps_per_call


class Samples(NamedTuple):
    """What training samples are drawn from; every set is uint8 Plates, and each but `good` may be None.

    Attributes:
      good: the line's good images.
      library: defects to insert into them.
      labelled: defective training images; `masks` are theirs, 0 and 1; `marks` int32 `[n, k, 2]` are k places (row, column)
        of defective pixels of each.
      new_line: good images of another line, mixed in while adapting.
    """

    good: Plates
    library: Library | None = None
    labelled: Plates | None = None
    masks: Plates | None = None
    marks: Array | np.ndarray | None = None
    new_line: Plates | None = None


class Batch(NamedTuple):
    """`image` float32 `[b, p, p, 1]` in [0, 1]; `mask` float32 `[b, p, p, 1]`, 0 or 1; `label` float32 `[b]`, 0 or 1."""

    image: Array
    mask: Array
    label: Array


def draw(config: configs.Segmentation, share: float, data: Samples, step: Array, root: Array) -> Batch:
    """A batch in which a sample is defective with probability `share`; pure and jittable.

    A defective sample is a good one with a defect inserted where there is a library, else a patch of a labelled image around
    a defective pixel.
    Where there is a new line, a sample is one of its good ones with probability `config.new_line`, whatever it was.
    """

    def key(name):
        return stream(root, name, step)

    def crops(name, plates):
        places = patches.random_crops(key(name), plates.sizes, num=config.batch_size, patch_size=config.patch_size)
        return parallel.split_batch(places)

    image = patches.cut(data.good, crops("crops", data.good), patch_size=config.patch_size)
    if config.flips:
        image = patches.random_flips(key("flips"), image)
    mask = jnp.zeros_like(image)
    if data.library is not None:
        image, inserted, _ = defects.insert(
            key("defects"),
            image,
            data.library,
            max_defects=config.max_defects,
            probability=share,
            blend=config.blend,
            augment=config.augment,
        )
        mask = inserted.astype(jnp.float32)
    elif data.labelled is not None and data.masks is not None and data.marks is not None:
        places = parallel.split_batch(_around_a_mark(key("labelled"), data.labelled, data.marks, config))
        chosen = jax.random.bernoulli(key("chosen"), share, (config.batch_size, 1, 1, 1))
        marked = patches.cut_pixels(data.masks, places, patch_size=config.patch_size).astype(jnp.float32)
        image = jnp.where(chosen, patches.cut(data.labelled, places, patch_size=config.patch_size), image)
        mask = jnp.where(chosen, marked[..., None], mask)
    if data.new_line is not None:
        other = patches.cut(data.new_line, crops("new line", data.new_line), patch_size=config.patch_size)
        chosen = jax.random.bernoulli(key("line"), config.new_line, (config.batch_size, 1, 1, 1))
        image, mask = jnp.where(chosen, other, image), jnp.where(chosen, jnp.zeros_like(mask), mask)
    return Batch(image, mask, jnp.any(mask > 0.5, axis=(1, 2, 3)).astype(jnp.float32))


def _around_a_mark(key: Array, plates: Plates, marks: Array | np.ndarray, config: configs.Segmentation) -> Crops:
    """Places of patches, each holding a random mark of a random image."""
    of_image, of_mark, of_place = jax.random.split(key, 3)
    image = jax.random.randint(of_image, (config.batch_size,), 0, marks.shape[0])
    mark = jnp.asarray(marks)[image, jax.random.randint(of_mark, image.shape, 0, marks.shape[1])]
    last = jnp.asarray(plates.sizes)[image] - config.patch_size
    corner = mark - jax.random.randint(of_place, mark.shape, 0, config.patch_size)
    top, left = jnp.clip(corner, jnp.zeros_like(last), last).T
    return Crops(image, top, left)


def labelled(
    good: Plates, images: Sequence[np.ndarray], masks: Sequence[np.ndarray], *, seed: int, marks: int = 64
) -> Samples:
    """Samples of labelled images uint8 `[h_i, w_i]` with masks bool `[h_i, w_i]`, none of them empty."""
    rng = np.random.default_rng([seed, 0x3A])
    places = [rng.choice(np.argwhere(mask), marks) for mask in masks]
    marked = patches.stack([mask.astype(np.uint8) for mask in masks])
    return Samples(good, None, patches.stack(images), marked, np.array(places, np.int32))


def network(config: configs.Segmentation) -> unet.UNet | compact_cnn.Segmenter:
    """The segmentation network of these settings."""
    dtype = jnp.dtype(config.dtype)
    if config.model == "unet":
        return unet.UNet(width=config.width, upsampling=config.upsampling, dtype=dtype)  # type: ignore[arg-type]
    return compact_cnn.Segmenter(dtype=dtype)


def _apply(model: unet.UNet | compact_cnn.Segmenter, variables: Any, image: Array) -> tuple[Array, Array]:
    """Features and logits with the statistics of training."""
    return model.apply(variables, image)  # type: ignore[return-value]


def _classifier(config: configs.Segmentation) -> compact_cnn.Classifier:
    return compact_cnn.Classifier(dtype=jnp.dtype(config.dtype))


@functools.lru_cache(maxsize=8)
def optimizer(config: configs.Segmentation, total_steps: int) -> optax.GradientTransformation:
    """Adadelta with a library's default settings, or Adam with a schedule."""
    if config.optimizer == "adadelta":
        return optimizers.clipped(optimizers.adadelta(config.adadelta), config)
    return optimizers.clipped(optax.adam(optimizers.schedule(config, total_steps)), config)


@functools.lru_cache(maxsize=8)
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


@functools.lru_cache(maxsize=8)
def classifier_objective(config: configs.Segmentation):
    """Objective of stage 2; `data` is (Samples, variables of the frozen segmentation stage)."""
    model, stage_1 = _classifier(config), network(config)
    activation = losses.activation(config.loss)
    share = configs.defective_share(config.classifier_ratio)

    def objective(params, extra, data, step, root):
        samples, frozen = data
        batch = draw(config, share, samples, step, root)
        features, logits = _apply(stage_1, frozen, batch.image)
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

    @jax.jit
    def make(key):
        params, extra = _split(network(config).init(key, x))
        return create(params, optimizer(config, total_steps), extra)

    return make(stream(jax.random.key(config.seed), "init segmentation"))


def initial_classifier(config: configs.Segmentation, frozen: Any) -> TrainState:
    """Stage 2 before its first step, behind stage 1 with the variables `frozen`."""
    x = jnp.zeros((1, config.patch_size, config.patch_size, 1))

    @jax.jit
    def make(key):
        params, extra = _split(_classifier(config).init(key, *network(config).apply(frozen, x)))
        return create(params, optimizer(config, config.total_classifier_steps), extra)

    return make(stream(jax.random.key(config.seed), "init classifier"))


def _split(variables: Any) -> tuple[Any, dict]:
    variables = dict(variables)
    return variables.pop("params"), variables


def variables(state: TrainState) -> dict:
    """The network's variables in a training state."""
    return {"params": state.params, **state.extra}


# One compiled step for runs of the same objective and rule on the same devices; the seed comes in as data.
_step = functools.lru_cache(maxsize=16)(make_step)


def train(
    objective,
    rule,
    data: Any,
    state: TrainState,
    *,
    config: configs.Segmentation,
    stage: str,
    steps: int,
    on_step=None,
    save=None,
    mesh: Mesh | None = None,
) -> TrainState:
    """Trains one stage to `steps` with the settings' seed and cadence; every stage draws samples of its own.

    `on_step` and `save` are as `train.loop.run`'s; on all devices unless a `mesh` is given.

    Raises:
      InputError: a batch that the devices do not divide, or a loss that is not finite.
    """
    mesh = parallel.mesh() if mesh is None else mesh
    parallel.check_batch(config.batch_size, mesh)
    state, data = parallel.put((state, data), parallel.replicated(mesh))
    per_call = steps_per_call(steps, config.checkpoint_every)
    step = _step(objective, rule, steps_per_call=per_call, mesh=mesh)

    def on_metrics(first: int, metrics: dict[str, np.ndarray]) -> None:
        if on_step is not None:
            for i in range(len(metrics["loss"])):
                on_step(first + i + 1, {name: float(values[i]) for name, values in metrics.items()})

    return loop.run(
        step,
        state,
        data,
        stream(jax.random.key(config.seed), stage),
        steps=steps,
        steps_per_call=per_call,
        on_metrics=on_metrics,
        save=save,
        save_every=config.checkpoint_every,
    )


def _padded(image: Array) -> Array:
    """`[h, w]` -> `[1, h', w', 1]`, both sides multiples of 16 by reflection at the end."""
    h, w = image.shape
    return jnp.pad(image, ((0, -h % 16), (0, -w % 16)), mode="reflect")[None, :, :, None]


def classify(config: configs.Segmentation, stages: tuple[Any, Any], image: Array) -> Array:
    """Probability `[]` that an image `[h, w]` in [0, 1] is defective; `stages` are both stages' variables."""
    segmenter, classifier = stages
    features, logits = _apply(network(config), segmenter, _padded(image))
    return jax.nn.sigmoid(_classifier(config).apply(classifier, features, losses.activation(config.loss)(logits))[0])


@dataclasses.dataclass(frozen=True)
class SegmentationDetector:
    """The segmentation map as residual: tanh or sigmoid of the logits, a quarter-size one enlarged bilinearly."""

    config: configs.Segmentation
    library: Library | None = None

    def fit(self, images: Plates) -> Any:
        """Variables trained on good images with the library's defects inserted, in memory."""
        config = self.config
        state = initial_segmentation(config, config.total_steps)
        rule = optimizer(config, config.total_steps)
        if self.library is None:
            raise ValueError("fit needs a library of defects to insert into the good images")
        data = Samples(images, self.library)
        return variables(
            train(
                segmentation_objective(config),
                rule,
                data,
                state,
                config=config,
                stage="train",
                steps=config.total_steps,
            )
        )

    def residual(self, state: Any, image: Array) -> Array:
        """Map `[h, w]` of an image `[h, w]` of any size from 16x16."""
        padded = _padded(image)
        _, logits = _apply(network(self.config), state, padded)
        found = losses.activation(self.config.loss)(logits)[0, :, :, 0]
        if found.shape != padded.shape[1:3]:
            found = jax.image.resize(found, padded.shape[1:3], "bilinear", antialias=False)
        return found[: image.shape[0], : image.shape[1]]
