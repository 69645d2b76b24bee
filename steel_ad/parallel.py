"""Data parallelism over the devices of one or several processes: one mesh axis, batches spread over it, all else replicated.

A step is one program over all devices. It is the one-device program, which the compiler divides: random numbers do not depend on
the division, means (of the loss, of batch norm) are over the global batch, and what is added is one sum of all gradients.
Every process runs the same code on the same settings, data and workdir; process 0 alone writes small files and shows progress.
"""

import contextlib
import contextvars
import socket
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from steel_ad.errors import InputError

LOST = (
    "a process of this run has ended, was not started within two minutes, or cannot be reached: see what it said, then start all "
    "of them again with the same commands to go on from the last checkpoint"
)
_AXIS = "data"
_ALONE: contextvars.ContextVar[jax.Device | None] = contextvars.ContextVar("alone", default=None)
_TIMEOUT_S = 60  # without a sign of life a process counts as dead


def start(coordinator: str, num_processes: int | None, process_id: int | None) -> None:
    """Makes this process one of a run of several; to be called before anything is computed.

    Args:
      coordinator: host:port of process 0, where the port is free, or "auto": all three from Slurm, Open MPI or the TPU pod.
      num_processes: of the run.
      process_id: 0 to num_processes - 1, each once.

    Raises:
      InputError: the arguments do not fit, the port is taken, or there is no cluster. Where the other processes do not come, the
        runtime aborts.
    """
    auto = coordinator == "auto"
    if auto != (num_processes is None and process_id is None) or (
        not auto and (num_processes is None or process_id is None or not 0 <= process_id < num_processes)
    ):
        raise InputError(
            "--coordinator=host:port needs --num_processes=N and --process_id=I with I in 0..N-1; "
            "--coordinator=auto takes neither"
        )
    if not auto and not coordinator.rpartition(":")[2].isdigit():
        raise InputError(f"--coordinator={coordinator} must be host:port of process 0, or auto")
    if process_id == 0:
        try:
            socket.create_server(("", int(coordinator.rpartition(":")[2]))).close()
        except (OSError, OverflowError) as error:
            raise InputError(
                f"the port of --coordinator={coordinator} is taken or cannot be used ({error}): choose another"
            ) from None
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would swallow SIGTERM, with which schedulers and people stop a run.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            None if auto else coordinator,
            num_processes,
            process_id,
            initialization_timeout=2 * _TIMEOUT_S,
            heartbeat_timeout_seconds=_TIMEOUT_S,
        )
    except ValueError:
        raise InputError(
            "--coordinator=auto finds no cluster here: give --coordinator=host:port, --num_processes=N and --process_id=I"
        ) from None
    # Gloo connects at the first collective and waits 30 s there; one process may have to compile what another one has cached.
    barrier("start")


def lost(error: Exception) -> InputError | None:
    """The sentence for an error that another process's end has caused, None for any other error."""
    said = str(error).partition("\n")[0]
    signs = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED")
    if not jax.distributed.is_initialized() or not any(sign in said for sign in signs):
        return None
    return InputError(f"{LOST} ({said})", status=1)


def is_main() -> bool:
    """Whether this is process 0, which writes and speaks for all."""
    # The first question must not start the backend.
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def alone(device: jax.Device) -> Iterator[None]:
    """What this thread does within uses one device only and shows no progress, while other threads do the like on others."""
    token = _ALONE.set(device)
    try:
        with jax.default_device(device):
            yield
    finally:
        _ALONE.reset(token)


def is_alone() -> bool:
    """Whether this thread is inside of `alone`."""
    return _ALONE.get() is not None


def first_device() -> jax.Device:
    """The one of `alone`, else the first."""
    return _ALONE.get() or jax.devices()[0]


def mesh(devices: int | None = None) -> Mesh:
    """The first `devices` devices, or all of every process, along one axis; inside of `alone` its device."""
    chosen = [first_device()] if is_alone() else jax.devices()[:devices]
    return jax.make_mesh((len(chosen),), (_AXIS,), axis_types=(AxisType.Auto,), devices=chosen)


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, P())


def spread(mesh: Mesh) -> NamedSharding:
    """Axis 0 over the devices."""
    return NamedSharding(mesh, P(_AXIS))


def spread_batches(mesh: Mesh) -> NamedSharding:
    """Axis 1 over the devices, of several batches along axis 0."""
    return NamedSharding(mesh, P(None, _AXIS))


def part(size: int, mesh: Mesh) -> slice:
    """This process's part of a batch of `size`."""
    parts = [i[0] for i in spread(mesh).addressable_devices_indices_map((size,)).values() if i]
    return slice(min(s.start or 0 for s in parts), max(size if s.stop is None else s.stop for s in parts))


def spread_parts(batches: np.ndarray, mesh: Mesh) -> jax.Array:
    """Batches `[k, b, ...]` with their axis 1 over the devices, of each process's `part` of them."""
    return jax.make_array_from_process_local_data(spread_batches(mesh), batches)


def put(tree: Any, sharding: NamedSharding) -> Any:
    """Arrays that every process has whole, numpy's or one device's, as arrays of this sharding."""

    def one(x):
        if jax.process_count() == 1 or (isinstance(x, jax.Array) and not x.is_fully_addressable):
            return jax.device_put(x, sharding)
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(one, tree)


def local(tree: Any) -> Any:
    """This process's own copy of replicated arrays, on its first device; not a copy where there is one device only."""
    return jax.tree.map(lambda x: x.addressable_data(0) if isinstance(x, jax.Array) else x, tree)


def inside(mesh: Mesh) -> contextlib.AbstractContextManager:
    """While a function is traced: where its `split_batch`es spread to."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def split_batch(tree: Any) -> Any:
    """Spreads axis 0 of arrays over the devices, and so what is computed from them; outside `inside` it does nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    return tree if mesh.empty or mesh.size == 1 else jax.lax.with_sharding_constraint(tree, P(_AXIS))


def check_batch(size: int, mesh: Mesh) -> None:
    """Whether the devices divide a global batch.

    Raises:
      InputError: they do not.
    """
    if size % mesh.size:
        fits = " or ".join(str(mesh.size * k) for k in (size // mesh.size, size // mesh.size + 1) if k)
        raise InputError(
            f"a batch of {size} cannot be divided among {mesh.size} devices: set --config.batch_size={fits} "
            "(it counts the patches of all devices together)"
        )
