"""Checkpoints of a training state, written in the background and renamed into place when whole. The only importer of orbax."""

import contextlib
import threading
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from steel_ad import parallel
from steel_ad.errors import InputError

_SUM = "crc32"  # of the state; a flipped bit in a checkpoint's data would else be read as another number
# orbax numbers its writes for the whole process, and one that begins during another takes its signals for its own.
_ONE_WRITE = threading.Lock()


def _checksum(state: Any) -> int:
    total = 0
    for leaf in jax.tree.leaves(parallel.local(state)):
        total = zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8), total)
    return total


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for the last write."""

    def __init__(self, directory: Path, *, keep: int = 2):
        self.directory = directory.absolute()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            options = ocp.CheckpointManagerOptions(max_to_keep=keep, step_prefix="step")
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        except OSError as error:
            raise self._failed(error) from None

    def _failed(self, error: Exception) -> InputError:
        if gone := parallel.lost(error):
            return gone
        # tensorstore's sentence names every layer; the last part is the system's reason.
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0].rsplit(": ", 1)[-1]
        return InputError(
            f"the checkpoint in {self.directory} cannot be written ({reason}): free some space, then run again; "
            "earlier checkpoints are kept",
            status=1,
        )

    def latest(self) -> int | None:
        """Step of the newest whole checkpoint, or None."""
        return self._manager.latest_step()

    def restore(self, like: Any) -> tuple[Any, dict]:
        """State and record of the newest checkpoint; `like` is a state of the same structure, arrays or shapes.

        Raises:
          InputError: the files are damaged, or hold a state of another structure.
        """
        template = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        step = self._manager.latest_step()
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardRestore(template), record=ocp.args.JsonRestore()),
            )
        except Exception as error:  # orbax passes on whatever its readers raised, of damaged data an Exception itself
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"the checkpoint of step {step} in {self.directory} cannot be read ({reason}): "
                "delete that step's folder to go on from the one before, or use a new --workdir",
                status=1,
            ) from None
        record = dict(restored.record)
        if record.pop(_SUM, None) not in (None, _checksum(restored.state)):
            raise InputError(
                f"the checkpoint of step {step} in {self.directory} holds other numbers than were written: delete that step's "
                "folder to go on from the one before, or use a new --workdir",
                status=1,
            )
        return restored.state, record

    def save(self, step: int, state: Any, record: dict) -> None:
        """Begins to write; arrays are copied before it returns, so the state may be donated. Inside of `parallel.alone` it
        returns when all is on disk, since runs side by side write one after the other.

        Raises:
          InputError: the disk is full or not writable, now or at the write before.
        """
        record = {**record, _SUM: _checksum(state)}
        try:
            with _ONE_WRITE:
                self._manager.save(
                    step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record))
                )
                if parallel.is_alone():
                    self._manager.wait_until_finished()
        except Exception as error:  # orbax passes on whatever its writers raised
            raise self._failed(error) from None

    def wait(self) -> None:
        """Returns when all is on disk.

        Raises:
          InputError: the last write failed.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            # After a failed write it fails once more; what is worth saying has been said.
            with contextlib.suppress(Exception):
                self._manager.close()


def newest(folder: Path, like: Any) -> Any:
    """The training state of a folder's newest checkpoint, on this process's first device; `like` is such a state's shapes.

    Raises:
      InputError: there is none, it is damaged, or it is of another structure.
    """
    # A checkpoint of an accelerator is restored to what is here.
    here = jax.sharding.SingleDeviceSharding(parallel.first_device())
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), like)
    if folder.is_dir():
        with Checkpoints(folder) as checkpoints:
            if checkpoints.latest() is not None:
                return checkpoints.restore(like)[0]
    raise InputError(f"there is no checkpoint in {folder.parent}: train first")
