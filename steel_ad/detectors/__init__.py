"""Anomaly detectors behind one protocol: trained networks and methods without training alike.

A new detector is a subclass of `Detector` in a file of its own and one line in `REGISTRY`; a user's own is named
`module:Class`. Evaluation, inspection, export, detectability and results know nothing else of it.
"""

import abc
import dataclasses
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array

from steel_ad import files, named
from steel_ad.errors import InputError

# The name of a detector without training is the name of its map, and what --config.maps takes.
REGISTRY = {
    "phase_only": "steel_ad.detectors.phase_only:PhaseOnlyDetector",
    "whitening": "steel_ad.detectors.whitening:WhiteningDetector",
    "lattice": "steel_ad.detectors.lattice:LatticeDetector",
}


class Detector(abc.ABC):
    """A method that says of every pixel how unlike a good plate it is.

    A subclass needs `name`, `fit` and `residual`; the rest has a default.

    Attributes:
      name: of its first residual map, in files, flags and tables.
      least_px: least height and width of an image.
      side_multiple: an exported program takes images whose sides are any multiples of it; 0: sides are fixed at export.
    """

    least_px: int = 1
    side_multiple: int = 0

    @property
    @abc.abstractmethod
    def name(self) -> str: ...

    @property
    def names(self) -> tuple[str, ...]:
        """Names of `maps`, the first one `name`."""
        return (self.name,)

    @classmethod
    def configured(cls, config: Any) -> "Detector":
        """The detector with the settings of an experiment, of which it takes what it knows."""
        return cls()

    @abc.abstractmethod
    def fit(self, images: Sequence[np.ndarray]) -> Any:
        """The state, a pytree of arrays, learned from good images uint8 `[h_i, w_i]`."""

    @abc.abstractmethod
    def residual(self, state: Any, image: Array) -> Array:
        """How unlike a good plate each pixel is: image float32 `[h, w]` in [0, 1] -> float32 `[h, w]`, higher is worse.

        Pure and jittable; `jax.vmap` makes the batch.
        """

    def maps(self, state: Any, image: Array) -> dict[str, Array]:
        """All residual maps by name, the first one `residual`; what they have in common is computed once."""
        return {self.name: self.residual(state, image)}

    def only(self, name: str) -> "Detector":
        """The detector with one of its maps, which becomes its `name`.

        Raises:
          InputError: it has no such map.
        """
        if name != self.name:
            raise InputError(f"--map={name} is no map of this detector: leave it out, or use {self.name}")
        return self

    def probability(self, state: Any, image: Array) -> Array | None:
        """Probability `[]` that an image `[h, w]` is defective, by a classifier of its own; None: it has none."""
        return None

    def to_arrays(self, state: Any) -> dict[str, np.ndarray]:
        """A state as named arrays, to be saved; by default a nested dict's leaves under their paths, "a/b"."""
        return {
            "/".join(str(k.key) for k in path): np.asarray(a) for path, a in jax.tree_util.tree_leaves_with_path(state)
        }

    def from_arrays(self, arrays: Mapping[str, np.ndarray]) -> Any:
        """The state of which `to_arrays` made these."""
        state: dict[str, Any] = {}
        for path, array in arrays.items():
            *parents, name = path.split("/")
            place = state
            for parent in parents:
                place = place.setdefault(parent, {})
            place[name] = array
        return state

    def save(self, state: Any, folder: Path) -> None:
        """Writes the state to `folder`, as `detectors/<name>.npz`; raises as `files.write_bytes`."""
        data = io.BytesIO()
        np.savez(data, **self.to_arrays(state))  # type: ignore[arg-type]
        files.write_bytes(folder / "detectors" / f"{file_name(self.name)}.npz", data.getvalue())

    def restore(self, folder: Path) -> Any:
        """The state that `save` wrote to `folder`.

        Raises:
          InputError: there is none, or its file is damaged.
        """
        path = folder / "detectors" / f"{file_name(self.name)}.npz"
        if not path.exists():
            raise InputError(f"there is no fitted detector in {folder}: run its experiment to the end first")
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return self.from_arrays(dict(arrays))
        except Exception as error:  # a damaged archive raises whatever its readers do
            raise InputError(f"{path} cannot be read ({error}): run the experiment again in a new --workdir") from None


def file_name(name: str) -> str:
    """A detector's name as the name of a file."""
    return name.replace(":", ".").replace("/", "_")


def detector_class(name: str) -> type[Detector]:
    """The detector of a name in `REGISTRY`, or of a user's `module:Class`.

    Raises:
      InputError: there is none, it cannot be imported, or it is no `Detector`.
    """
    found = named.find(name, REGISTRY, "detector", "--config.maps")
    if not (isinstance(found, type) and issubclass(found, Detector)):
        raise InputError(f"--config.maps={name} is no detector: give a subclass of steel_ad.detectors.Detector")
    return found


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A detector, its state, and what must be known to inspect with it.

    Attributes:
      state: what `detector.fit` returned.
      radius: of the opening's disk, px.
      threshold: of the opened map (SPEC section 4), None where the run has not been evaluated.
      origin: the workdir that it comes from, for people.
      settings: of the run.
      trained_on: hashes of the images that it was fitted to.
      finished: whether its training is.
    """

    detector: Detector
    state: Any
    radius: int
    threshold: float | None
    origin: str
    settings: dict[str, Any]
    trained_on: frozenset[str]
    finished: bool = True

    @property
    def least_px(self) -> int:
        """Least height and width of an image."""
        return self.detector.least_px

    @property
    def sha256(self) -> str:
        """Of the settings that the map depends on, and of the state."""
        given = {k: v for k, v in self.settings.items() if k not in ("data", "defects", "experiment")}
        digest = hashlib.sha256(json.dumps([self.detector.name, self.radius, given], sort_keys=True).encode())
        for leaf in jax.tree.leaves(self.state):
            digest.update(np.asarray(leaf).tobytes())
        return digest.hexdigest()
