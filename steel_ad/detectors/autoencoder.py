"""The autoencoder as a detector: what it cannot reconstruct is a defect (SPEC section 4)."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from steel_ad import config as configs
from steel_ad import losses, models
from steel_ad.data import patches
from steel_ad.data.images import Images
from steel_ad.data.patches import Crops, Plates
from steel_ad.detectors import Detector
from steel_ad.errors import InputError
from steel_ad.ops import sliding
from steel_ad.ops.ssim import CONSTANTS, ssim_residual
from steel_ad.train import checkpoint, feed, optimizers
from steel_ad.train.feed import Set
from steel_ad.train.fit import fit
from steel_ad.train.stage import Stage
from steel_ad.train.state import TrainState, create, first, stream

# Contrast of a reconstruction, as a share of the target's, below which it shows nothing.
_FLAT = 0.02

# Windows that go through the network at once. On CPU the activations of more than some 25 leave the caches, which takes a
# quarter longer; a GPU is a quarter slower with 128 than with 1024.
_TILES, _TILES_ON_CPU = 1024, 25
# Windows of one image that are kept for several strides: 128 MiB of 128x128 pixels.
_KEPT = 2048


def model(config: configs.Autoencoder) -> Any:
    """The network of these settings: patches `[b, p, p, 1]` to their reconstructions."""
    return models.build(models.AUTOENCODERS, config)


def optimizer(config: configs.Autoencoder) -> optax.GradientTransformation:
    """Adam with the settings' schedule, clipping and either form of decay."""
    rate = optimizers.schedule(config, config.total_steps)
    if config.decay == "learning_rate":
        return optimizers.clipped(optax.adam(lambda step: rate(step) / (1 + config.weight_decay * step)), config)
    decay = optax.add_decayed_weights(config.weight_decay) if config.weight_decay else optax.identity()
    return optimizers.clipped(optax.chain(decay, optax.adam(rate)), config)


def loss_function(config: configs.Autoencoder) -> Callable[[Array, Array], Array]:
    """The settings' loss, `(reconstruction, target) [b, p, p, 1] -> [b]`.

    Raises:
      InputError: no such loss, or an option that it does not take.
    """
    options = dict(config.loss_options)
    if config.loss in losses.LOSSES and "c1" in losses.option_names(losses.LOSSES[config.loss]):
        options = dict(zip(("c1", "c2"), CONSTANTS[config.constants], strict=True)) | options
    return losses.get(config.loss, options)


class Good(NamedTuple):
    """Good images to train on; `kept`: the places of "fixed" crops, all that there are, None of "fresh" ones."""

    images: Set
    kept: Crops | None = None


def good(config: configs.Autoencoder, images: Plates | Images, root: Array) -> Good:
    """The images with the places of "fixed" crops.

    Raises:
      InputError: an image smaller than the patch.
    """
    if int(np.min(images.sizes)) < config.patch_size:
        raise InputError(
            f"an image of {np.min(images.sizes)} pixels is smaller than the patch of {config.patch_size}: "
            "leave it out or use a smaller --config.patch_size"
        )
    if config.crops == "fresh":
        return Good(images)
    key = stream(root, "kept crops")
    return Good(images, patches.random_crops(key, images.sizes, num=config.num_crops, patch_size=config.patch_size))


def choose(config: configs.Autoencoder, data: Good, step: Array, root: Array) -> dict[str, Crops]:
    """Where the patches of a step are: see `train.stage.Stage`."""
    if data.kept is None:
        key = stream(root, "crops", step)
        crops = patches.random_crops(key, data.images.sizes, num=config.batch_size, patch_size=config.patch_size)
        return {"images": crops}
    epoch, batch = jnp.divmod(step, config.steps_per_epoch)
    order = jax.random.permutation(stream(root, "order", epoch), config.num_crops)
    chosen = jax.lax.dynamic_slice_in_dim(order, batch * _batch(config), _batch(config))
    return {"images": jax.tree.map(lambda a: a[chosen], data.kept)}


def objective(config: configs.Autoencoder):
    """The training objective of `train.step.make_step`; `data` is Good."""
    network, loss = model(config), loss_function(config)

    def run(params, extra, data, step, root):
        cut = feed.cut(data, choose(config, data, step, root), patch_size=config.patch_size)
        x = patches.scaled(cut["images"])
        if config.flips:
            x = patches.random_flips(stream(root, "flips", step), x)
        y = jnp.asarray(network.apply(params, x))
        # How much of the pattern the reconstruction shows: near 0 where training is dead.
        contrast = jnp.std(y, axis=(1, 2, 3)).mean() / (jnp.std(x, axis=(1, 2, 3)).mean() + 1e-6)
        return loss(y, x).mean(), (extra, {"contrast": contrast})

    return run


def initial_state(config: configs.Autoencoder, root: Array) -> TrainState:
    """State before the first step, made on the device."""
    network, rule = model(config), optimizer(config)
    x = jnp.zeros((1, config.patch_size, config.patch_size, 1))

    return first(lambda key: create(network.init(key, x), rule), stream(root, "init"))


def _batch(config: configs.Autoencoder) -> int:
    return min(config.batch_size, config.num_crops) if config.crops == "fixed" else config.batch_size


class DeadRun:
    """Stops a run whose reconstructions have stayed flat: a saturated sigmoid gives no gradient to recover by.

    `history`: rows of the steps before, so that a run which goes on does not begin to wait anew.
    """

    def __init__(self, config: configs.Autoencoder, history: Iterable[Mapping[str, float]] = ()):
        self.patience = max(300, config.total_steps // 5)
        self.last = config.total_steps
        self.flat_since: int | None = None
        for row in history:
            self._look(int(row["step"]), row.get("contrast", 1.0))

    def _look(self, step: int, contrast: float) -> int:
        """Steps since the reconstructions went flat."""
        self.flat_since = None if contrast >= _FLAT else self.flat_since or step
        return step - (self.flat_since or step)

    def __call__(self, step: int, row: Mapping[str, float]) -> None:
        """Looks at a step, in order.

        Raises:
          InputError: the run is dead.
        """
        flat = self._look(step, row["contrast"])
        if flat >= self.patience or (step == self.last and flat >= 50):
            raise InputError(
                f"training is dead: since step {self.flat_since} every reconstruction is flat; "
                "lower --config.learning_rate, set --config.clip_norm=1 and --config.warmup_steps=100, "
                "or try another --config.seed, in a new --workdir",
                status=1,
            )


@functools.lru_cache(maxsize=16)
def stage(config: configs.Autoencoder) -> Stage:
    """What training with these settings is; their seed does not matter."""
    return Stage(
        objective=objective(config),
        optimizer=optimizer(config),
        choose=functools.partial(choose, config),
        steps=config.total_steps,
        batch_size=_batch(config),
        patch_size=config.patch_size,
        checkpoint_every=config.checkpoint_every,
        watch=functools.partial(DeadRun, config),
    )


def train(
    config: configs.Autoencoder, images: Plates | Images, *, state: TrainState | None = None, **options: Any
) -> TrainState:
    """Trains on good images, from `state` where one is given; `options` are those of `train.fit.fit`.

    Raises:
      InputError: an image smaller than the patch, a dead run, or as `fit`.
    """
    root = jax.random.key(config.seed)
    state = initial_state(config, root) if state is None else state
    return fit(stage(dataclasses.replace(config, seed=0)), good(config, images, root), state, root, **options)


def reconstruct(config: configs.Autoencoder, params: Any, image: Array) -> Array:
    """Image float32 `[h, w]` in [0, 1] from its overlapping windows' reconstructions, averaged: float32 `[h, w]`."""
    head, rest = _network(config, params)
    return sliding.through(rest, image, size=config.patch_size, stride=config.stride, at_once=_at_once(), head=head)


def reconstructions(config: configs.Autoencoder, params: Any, image: Array, strides: Sequence[int]) -> list[Array]:
    """As `reconstruct`, at several strides; the network sees each window of the finest once, unless there are too many to keep.

    Args:
      strides: multiples of the first one, which is the finest.
    """
    size, (head, rest) = config.patch_size, _network(config, params)
    rows, columns = (sliding.positions(side, size, strides[0]) for side in image.shape)
    if len(rows) * len(columns) > _KEPT:
        return [reconstruct(dataclasses.replace(config, stride=stride), params, image) for stride in strides]
    cut = functools.partial(sliding.heads, head) if head else sliding.windows
    tiles = cut(image, size=size, stride=strides[0])
    if len(tiles) <= _at_once():
        tiles = rest(tiles)
    else:
        tiles = jax.lax.map(lambda tile: rest(tile[None])[0], tiles, batch_size=_at_once())
    found = []
    for stride in strides:
        chosen = [
            rows.index(top) * len(columns) + columns.index(left)
            for top in sliding.positions(image.shape[0], size, stride)
            for left in sliding.positions(image.shape[1], size, stride)
        ]
        found.append(sliding.average(tiles[np.array(chosen)], shape=image.shape, stride=stride))
    return found


def _network(
    config: configs.Autoencoder, params: Any
) -> tuple[Callable[[Array], Array] | None, Callable[[Array], Array]]:
    """Windows `[n, p, p]` to their reconstructions: all of it, or, where overlapping windows share its head, head and rest."""

    network = model(config)
    # Layers that overlapping windows can share; another network has none.
    head = getattr(network, "head", 0)
    if jax.default_backend() != "cpu" or not head:
        return None, lambda tiles: jnp.asarray(network.apply(params, tiles[..., None]))[..., 0]
    return (
        lambda tiles: network.apply(params, tiles[..., None], last=head),
        lambda x: network.apply(params, x, first=head)[..., 0],
    )


def _at_once() -> int:
    return _TILES_ON_CPU if jax.default_backend() == "cpu" else _TILES


@dataclasses.dataclass(frozen=True)
class AutoencoderDetector(Detector):
    """Residuals between an image and its reconstruction: "ssim" (1 - SSIM, in [0, 2]) and "l2" (absolute difference).

    Its maps are `config.maps`; the state is the network's parameters.
    """

    config: configs.Autoencoder

    @property
    def name(self) -> str:
        return self.config.maps[0]

    @property
    def names(self) -> tuple[str, ...]:
        return self.config.maps

    @property
    def least_px(self) -> int:  # type: ignore[override]
        return self.config.patch_size

    def fit(self, images: Sequence[np.ndarray]) -> Any:
        """Parameters trained on good images."""
        return train(self.config, Images(images)).params

    def residual(self, state: Any, image: Array) -> Array:
        """The first map `[h, w]` of an image `[h, w]`, both sides at least `patch_size`."""
        return self.maps(state, image)[self.name]

    def maps(self, state: Any, image: Array) -> dict[str, Array]:
        return self.compare(reconstruct(self.config, state, image), image)

    def compare(self, reconstruction: Array, image: Array) -> dict[str, Array]:
        """All maps of an image and its reconstruction, both `[h, w]`."""
        c1, c2 = CONSTANTS[self.config.residual_constants]
        ssim = functools.partial(ssim_residual, window_size=self.config.window_size, c1=c1, c2=c2)
        residuals: dict[str, Callable[[Array, Array], Array]] = {"ssim": ssim, "l2": lambda x, y: jnp.abs(x - y)}
        return {name: residuals[name](reconstruction, image) for name in self.config.maps}

    def only(self, name: str) -> "AutoencoderDetector":
        if name not in ("ssim", "l2"):
            raise InputError(f"--map={name} must be ssim or l2")
        return dataclasses.replace(self, config=dataclasses.replace(self.config, maps=(name,)))

    def restore(self, folder: Path) -> Any:
        """The parameters of the newest checkpoint of a run in `folder`."""
        like = jax.eval_shape(lambda: initial_state(self.config, jax.random.key(self.config.seed)))
        return checkpoint.newest(folder / "checkpoints", like).params
