"""CompactCNN and U-Net, with the classification stage behind either, as detectors (SPEC section 2)."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh

from steel_ad import config as configs
from steel_ad import losses, models, parallel
from steel_ad.data import defects, patches, workers
from steel_ad.data.defects import Library
from steel_ad.data.images import Images
from steel_ad.data.patches import Crops, Plates
from steel_ad.detectors import Detector
from steel_ad.models import compact_cnn
from steel_ad.train import checkpoint, loop, optimizers
from steel_ad.train.state import TrainState, create, first, stream
from steel_ad.train.step import make_step, steps_per_call

# Steps whose places are drawn at once, where patches are cut outside of the step.
_DRAWN = 64


class Samples(NamedTuple):
    """What training samples are drawn from; every set is uint8 Plates, and each but `good` may be None.

    Sets that are Images are read while `train` goes on; what a step gets in their place are the patches that it uses, uint8
    `[b, p, p]`, cut at its places.

    Attributes:
      good: the line's good images.
      library: defects to insert into them.
      labelled: defective training images; `masks` are theirs, 0 and 1; `marks` int32 `[n, k, 2]` are k places (row, column)
        of defective pixels of each.
      new_line: good images of another line, mixed in while adapting.
    """

    good: Plates | Images | Array
    library: Library | None = None
    labelled: Plates | Images | Array | None = None
    masks: Plates | Images | Array | None = None
    marks: Array | np.ndarray | None = None
    new_line: Plates | Images | Array | None = None


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

    def cut(places: Callable[[Any], Crops], *sets: Any) -> list[Array]:
        """Patches uint8 `[b, p, p]` of each of the sets, all at the places `places(first set)`."""
        if not isinstance(sets[0], Plates):
            return [parallel.split_batch(pixels) for pixels in sets]
        crops = parallel.split_batch(places(sets[0]))
        return [patches.cut_pixels(plates, crops, patch_size=config.patch_size) for plates in sets]

    (pixels,) = cut(lambda plates: _crops(config, "crops", plates.sizes, step, root), data.good)
    image = patches.scaled(pixels)
    if config.flips:
        image = patches.random_flips(stream(root, "flips", step), image)
    mask = jnp.zeros_like(image)
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
    elif data.labelled is not None:
        pixels, marked = cut(
            lambda plates: _around_a_mark(config, plates.sizes, data.marks, step, root), data.labelled, data.masks
        )
        chosen = _chosen(config, "chosen", share, step, root)
        image = jnp.where(chosen, patches.scaled(pixels), image)
        mask = jnp.where(chosen, marked.astype(jnp.float32)[..., None], mask)
    if data.new_line is not None:
        (pixels,) = cut(lambda plates: _crops(config, "new line", plates.sizes, step, root), data.new_line)
        chosen = _chosen(config, "line", config.new_line, step, root)
        image, mask = jnp.where(chosen, patches.scaled(pixels), image), jnp.where(chosen, jnp.zeros_like(mask), mask)
    return Batch(image, mask, jnp.any(mask > 0.5, axis=(1, 2, 3)).astype(jnp.float32))


def _crops(config: configs.Segmentation, name: str, sizes: Array | np.ndarray, step: Array, root: Array) -> Crops:
    return patches.random_crops(stream(root, name, step), sizes, num=config.batch_size, patch_size=config.patch_size)


def _chosen(config: configs.Segmentation, name: str, share: float, step: Array, root: Array) -> Array:
    """Whether a sample is taken from another set than the good images: bool `[b, 1, 1, 1]`."""
    return jax.random.bernoulli(stream(root, name, step), share, (config.batch_size, 1, 1, 1))


def _around_a_mark(config: configs.Segmentation, sizes: Any, marks: Any, step: Array, root: Array) -> Crops:
    """Places of patches, each holding a random mark of a random image."""
    of_image, of_mark, of_place = jax.random.split(stream(root, "labelled", step), 3)
    image = jax.random.randint(of_image, (config.batch_size,), 0, marks.shape[0])
    mark = jnp.asarray(marks)[image, jax.random.randint(of_mark, image.shape, 0, marks.shape[1])]
    last = jnp.asarray(sizes)[image] - config.patch_size
    corner = mark - jax.random.randint(of_place, mark.shape, 0, config.patch_size)
    top, left = jnp.clip(corner, jnp.zeros_like(last), last).T
    return Crops(image, top, left)


def streamed(
    config: configs.Segmentation,
    share: float,
    data: Samples,
    root: Array,
    *,
    first: int,
    steps: int,
    per_call: int,
    mesh: Mesh,
) -> Generator[dict[str, Array]]:
    """For each call from step `first` on, what `draw` takes in place of each set of `data` that is Stored: patches uint8
    `[per_call, b, p, p]`, zeros where it does not look. Each process reads its part of a batch, and of a sample one image."""
    sets = {name: s for name, s in data._asdict().items() if isinstance(s, Images)}
    images = Images(*sets.values())
    starts = dict(zip(sets, np.cumsum([0, *map(len, sets.values())]).tolist(), strict=False))
    sizes = {n: s.sizes for n in ("good", "labelled", "new_line") if (s := getattr(data, n)) is not None}
    mine = parallel.part(config.batch_size, mesh)

    @functools.partial(jax.jit, static_argnames="count")
    def draw(sizes, marks, first, count) -> Array:
        nothing = jnp.full((config.batch_size, 3), -1, jnp.int32)

        def of(name, crops) -> Array:
            if name not in sets:
                return nothing
            return jnp.stack([crops.image + starts[name], crops.top, crops.left], -1)

        def one(step) -> Array:
            image, mask = of("good", _crops(config, "crops", sizes["good"], step, root)), nothing
            if data.library is None and "labelled" in sizes:
                crops = _around_a_mark(config, sizes["labelled"], marks, step, root)
                chosen = _chosen(config, "chosen", share, step, root)[:, 0, 0]
                image, mask = (
                    jnp.where(chosen, of(name, crops), other) for name, other in (("labelled", image), ("masks", mask))
                )
            if "new_line" in sizes:
                crops = _crops(config, "new line", sizes["new_line"], step, root)
                chosen = _chosen(config, "line", config.new_line, step, root)[:, 0, 0]
                image, mask = jnp.where(chosen, of("new_line", crops), image), jnp.where(chosen, nothing, mask)
            return jnp.stack([image, mask] if "masks" in sets else [image])

        return jax.lax.map(one, first + jnp.arange(count, dtype=jnp.int32), batch_size=_DRAWN)

    def of_calls(call: int, count: int) -> np.ndarray:
        drawn = draw(sizes, data.marks, np.int32(call * per_call), count * per_call)
        return np.asarray(drawn).reshape(count, per_call, *drawn.shape[1:])[:, :, :, mine]

    batches = workers.batches(
        images,
        of_calls,
        first=first // per_call,
        total=steps // per_call,
        size=config.batch_size * per_call * (2 if "masks" in sets else 1),
        patch_size=config.patch_size,
    )
    with contextlib.closing(batches):
        for batch in batches:
            image, *mask = (parallel.spread_parts(batch[:, i], mesh) for i in range(batch.shape[1]))
            yield {name: mask[0] if name == "masks" else image for name in sets}


def labelled(good: Plates | Images, images: Images, masks: Images, *, seed: int, marks: int = 64) -> Samples:
    """Samples of labelled images with masks of 0 and 1, none of them empty; both stored or neither."""
    rng = np.random.default_rng([seed, 0x3A])
    places = np.array([rng.choice(np.argwhere(mask), marks) for mask in masks], np.int32)
    if images.stored:
        return Samples(good, None, images, masks, places)
    return Samples(good, None, patches.stack(images), patches.stack(masks), places)


def network(config: configs.Segmentation) -> Any:
    """The segmentation network of these settings: images `[b, h, w, 1]` to features and logits."""
    return models.build(models.SEGMENTERS, config)


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
        features, logits = stage_1.apply(frozen, batch.image)
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

    `data` is Samples for stage 1, (Samples, variables of stage 1) for stage 2; sets that are Images are read while it trains,
    with the same result. `on_step` and `save` are as `train.loop.run`'s; on all devices unless a `mesh` is given.

    Raises:
      InputError: a batch that the devices do not divide, or a loss that is not finite.
    """
    mesh = parallel.mesh() if mesh is None else mesh
    parallel.check_batch(config.batch_size, mesh)
    samples, *frozen = [data] if isinstance(data, Samples) else data
    read: Any = Samples(*(isinstance(s, Images) for s in samples))  # type: ignore[arg-type]
    absent: dict[str, Any] = {name: None for name, r in read._asdict().items() if r}
    here = samples._replace(**absent)
    if read.labelled:
        here = here._replace(marks=None)  # its places are not drawn in the step
    state, here, frozen = parallel.put((state, here, frozen), parallel.replicated(mesh))
    root = stream(jax.random.key(config.seed), stage)
    per_call = steps_per_call(steps, config.checkpoint_every)

    def given(samples: Samples, *rest: Any) -> Any:
        return (samples, *rest) if rest else samples

    data = given(here, *frozen)
    step = _step(
        objective,
        rule,
        steps_per_call=per_call,
        mesh=mesh,
        streamed=given(read, *(False for _ in frozen)) if any(read) else False,
    )

    def on_metrics(first: int, metrics: dict[str, np.ndarray]) -> None:
        if on_step is not None:
            for i in range(len(metrics["loss"])):
                on_step(first + i + 1, {name: float(values[i]) for name, values in metrics.items()})

    with contextlib.ExitStack() as stack:
        if any(read):
            share = configs.defective_share(config.classifier_ratio if frozen else config.ratio)
            batches = streamed(
                config, share, samples, root, first=int(state.step), steps=steps, per_call=per_call, mesh=mesh
            )
            stack.enter_context(contextlib.closing(batches))
            data = (given(here._replace(**batch), *frozen) for batch in batches)
        return loop.run(
            step,
            state,
            data,
            root,
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


@dataclasses.dataclass(frozen=True)
class SegmentationDetector(Detector):
    """The segmentation map as residual: tanh or sigmoid of the logits, a smaller one enlarged bilinearly.

    The state has the variables of "segmenter" and, where that stage is trained, of "classifier".

    Attributes:
      library: defects that `fit` inserts.
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
        """The segmentation stage trained on good images with the library's defects inserted, in memory."""
        config = self.config
        if self.library is None:
            raise ValueError("fit needs a library of defects to insert into the good images")
        trained = train(
            segmentation_objective(config),
            optimizer(config, config.total_steps),
            Samples(patches.stack(images), self.library),
            initial_segmentation(config, config.total_steps),
            config=config,
            stage="train",
            steps=config.total_steps,
        )
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
