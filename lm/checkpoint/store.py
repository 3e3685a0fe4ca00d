"""Checkpoints of a run, written with Orbax: FOLDER/STEP/ holds the state after STEP updates.

On disk a state is a nested dict of arrays. Its keys are the state's fields, dict keys and indices
("params/blocks/0/ffn/up", "opt_state/0/mu/..."); reading it needs no class of this or another
library. A save writes to a temporary folder and renames it, so a folder named by a number is
complete.
"""

import contextlib
import errno
import functools
import inspect
import logging
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Sharding, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from lm import trees
from lm.errors import UserError, check_positive
from lm.parallel import distributed


@dataclass(frozen=True, kw_only=True)
class Save:
    """When to save, and which checkpoints to keep.

    Args:
      every: saves each time the step is a multiple of this.
      minutes: saves also once this time has passed since the last save; None: never.
      keep_last: keeps the newest checkpoints, this many.
      keep_every: keeps every checkpoint whose step is a multiple of this; None: no others.
    """

    every: int
    minutes: float | None = None
    keep_last: int = 2
    keep_every: int | None = None

    def __post_init__(self) -> None:
        check_positive(**{"save.every": self.every, "save.keep_last": self.keep_last})
        if self.minutes is not None:
            check_positive(**{"save.minutes": self.minutes})
        if self.keep_every is not None:
            check_positive(**{"save.keep_every": self.keep_every})
            if self.keep_every % self.every:
                raise UserError(
                    f"save.keep_every={self.keep_every} must be a multiple of "
                    f"save.every={self.every}: other steps are not saved."
                )


class Store:
    """The checkpoints in a folder (a local path, or a bucket such as gs://...).

    With a `Save` it writes; opening it then removes incomplete saves. Without one it only reads,
    which is safe while another process trains. All processes of a run call its methods at the same
    steps.
    """

    def __init__(self, folder: epath.PathLike, save: Save | None = None) -> None:
        self.folder = epath.Path(folder)
        # TensorStore needs absolute paths; messages show the user's path.
        self._remote = "://" in str(folder)
        self._root = self.folder if self._remote else self.folder.expanduser().absolute()
        self._save = save
        _silence_aborted_tasks()
        self._saved_at = time.monotonic()
        self._saving: int | None = None  # the step being saved
        self._writer = None
        if save is not None:
            self._remove_incomplete()
            distributed.barrier("incomplete checkpoints removed")
            self._writer = _open_writer(self._root, save)

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """The complete checkpoints, oldest first."""
        if not self._root.is_dir():
            return []
        return sorted(found.step for found in _NAMES.find_all(self._root))

    def latest(self) -> int | None:
        """The newest complete checkpoint; None if there is none."""
        return max(self.steps(), default=None)

    def due(self, step: int, now: float) -> bool:
        """Whether the state after `step` updates is to be saved; `now` is time.monotonic()."""
        save = self._writing()
        if save.minutes is None:
            return step % save.every == 0
        waited = now - self._saved_at >= 60 * save.minutes
        return step % save.every == 0 or distributed.agree(waited, step)

    def save(self, step: int, state: Any, metadata: Mapping[str, Any] | None = None) -> None:
        """Starts an asynchronous save. Returns once the arrays are copied to the host, so they may
        be donated to the next step.

        Waits for the previous save first and raises its failure. Older checkpoints are deleted only
        after this one is complete.

        Args:
          step: the number of updates so far; the folder's name.
          state: any tree of arrays with a field or key `params`.
          metadata: stored as JSON beside the arrays.
        """
        self._writing()
        self.wait()  # raises the previous save's failure, which names its own step
        self._saving = step
        flat = _flat(state)
        custom = {"metadata": dict(metadata or {}), "checksums": checksums(flat)}
        with self._save_errors():
            self._writer.save_async(step, trees.unflatten(flat), force=True, custom_metadata=custom)
        self._saved_at = time.monotonic()

    def wait(self) -> None:
        """Waits until the last save is complete. Raises UserError if it failed (a full disk)."""
        if self._writer is not None:
            with self._save_errors():
                self._writer.wait()

    def close(self) -> None:
        """Waits for the last save and ends the threads that save."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            with self._save_errors():
                writer.close()

    def restore(self, abstract: Any, step: int | None = None) -> Any:
        """Restores the state of `step` (default: the newest) onto any mesh.

        `abstract` is the state as a tree of jax.ShapeDtypeStruct, each with its sharding (without
        one: the first device). Raises UserError if the checkpoint is damaged, or if its paths,
        shapes or dtypes differ.
        """
        step = self._existing(step)
        flat = _flat(abstract)
        self._check_fits(step, self._stored(step), flat)
        loaded = self._load(step, flat)
        return jax.tree.unflatten(jax.tree.structure(abstract), [loaded[path] for path in flat])

    def restore_params(
        self, step: int | None = None, shardings: Sharding | trees.Tree | None = None
    ) -> dict[str, Any]:
        """Restores only the parameters of `step` (default: the newest), as a nested dict of arrays.

        Shapes and dtypes come from the checkpoint. `shardings` is one sharding for all, a nested
        dict of them, in which a `trees.Leaf` has one for each of its arrays, or None for the first
        device. Does not read the optimizer state.
        """
        step = self._existing(step)
        stored = {p: x for p, x in self._stored(step).items() if p.startswith("params/")}
        if isinstance(shardings, Mapping):
            flat = _flat({"params": shardings})
            for path in [*flat, *stored]:
                if path not in stored or path not in flat:
                    where = "this model" if path in stored else f"checkpoint {step}"
                    raise self._mismatch(step, f"{path} is missing in {where}.")
        else:
            flat = dict.fromkeys(stored, shardings)
        abstract = {
            path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=flat[path])
            for path, x in stored.items()
        }
        loaded = self._load(step, abstract)
        if not isinstance(shardings, Mapping):
            return trees.unflatten(loaded)["params"]
        return jax.tree.unflatten(jax.tree.structure(shardings), [loaded[path] for path in flat])

    def metadata(self, step: int | None = None) -> dict[str, Any]:
        """The metadata passed to `save`."""
        step = self._existing(step)
        return self._custom_metadata(step).get("metadata", {})

    def _custom_metadata(self, step: int) -> dict[str, Any]:
        with self._read_errors(step):
            return ocp.metadata(self._root / str(step)).custom_metadata or {}

    def _writing(self) -> Save:
        if self._save is None or self._writer is None:
            raise ValueError(f"the store of {self.folder} was opened to read only, or is closed")
        return self._save

    def _existing(self, step: int | None) -> int:
        steps = self.steps()
        if not steps:
            raise UserError(f"There is no checkpoint in {self.folder}.")
        if step is not None and step not in steps:
            raise UserError(
                f"There is no checkpoint of step {step} in {self.folder}, "
                f"only of {', '.join(map(str, steps))}."
            )
        return steps[-1] if step is None else step

    def _stored(self, step: int) -> dict[str, Any]:
        """Path -> shape and dtype of the array in the checkpoint."""
        with self._read_errors(step):
            tree = ocp.metadata(self._root / str(step)).metadata
            if tree is None:
                raise ValueError("the arrays are damaged or missing")
            stored = trees.flatten(tree)
        if not any(path.startswith(("params/", "models/")) for path in stored):
            raise self._mismatch(step, "it holds no parameters of a run.")
        return stored

    def _check_fits(
        self, step: int, stored: Mapping[str, Any], expected: Mapping[str, Any]
    ) -> None:
        for path in [*expected, *stored]:
            old, new = (
                _describe(tree[path]) if path in tree else None for tree in (stored, expected)
            )
            if old is None:
                raise self._mismatch(step, f"it has no {path}; the experiment has {path}: {new}.")
            if new is None:
                raise self._mismatch(step, f"it has {path}: {old}; the experiment has no {path}.")
            if old != new:
                raise self._mismatch(step, f"{path} is {old} there and {new} in the experiment.")

    def _load(self, step: int, abstract: Mapping[str, Any]) -> dict[str, jax.Array]:
        first = SingleDeviceSharding(jax.local_devices()[0])
        placed = {
            path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or first)
            for path, x in abstract.items()
        }
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        recorded = self._custom_metadata(step).get("checksums", {})
        with self._read_errors(step), context:
            loaded = trees.flatten(ocp.load(self._root / str(step), trees.unflatten(placed)))
            for path, checksum in checksums(loaded).items():
                if recorded.get(path, checksum) != checksum:
                    raise ValueError(f"the checksum of {path} does not match")
        return loaded

    def _mismatch(self, step: int, why: str) -> UserError:
        return UserError(
            f"Checkpoint {self.folder / str(step)} does not match the experiment: {why}"
        )

    @contextlib.contextmanager
    def _read_errors(self, step: int) -> Iterator[None]:
        """Re-raises any error as a damaged checkpoint and names the previous usable step."""
        try:
            yield
        except (UserError, MemoryError):
            raise
        except Exception as error:
            path = self.folder / str(step)
            older = [s for s in self.steps() if s < step]
            raise UserError(
                f"Checkpoint {path} cannot be read ({_first_line(error)}). "
                + (
                    f"Delete {path} to resume from step {older[-1]}, the previous checkpoint."
                    if older
                    else "There is no earlier checkpoint."
                )
            ) from error

    @contextlib.contextmanager
    def _save_errors(self) -> Iterator[None]:
        """Re-raises any error as a failed save, in one sentence; complete checkpoints stay."""
        try:
            yield
        except Exception as error:
            self._remove_incomplete()  # frees space on a full disk
            latest = self.latest()
            full = _is_full(error)
            why = "the disk is full. Free space" if full else f"{_first_line(error)}. Fix it"
            then = "starts over" if latest is None else f"resumes from step {latest}"
            raise UserError(
                f"The checkpoint of step {self._saving} could not be saved in {self.folder}: "
                f"{why} and run the same command again; it {then}."
            ) from error

    def _remove_incomplete(self) -> None:
        # Orbax can do this too, but in the background, where it races with the first save.
        if not distributed.is_main() or not self._root.is_dir():
            return
        complete = {str(step) for step in self.steps()}
        for path in self._root.iterdir():
            # A bucket has no rename: an incomplete save has its final name but no commit marker.
            uncommitted = self._remote and path.name.isdigit() and path.name not in complete
            if ".orbax-checkpoint-tmp" in path.name or uncommitted:
                path.rmtree(missing_ok=True)


def _not_from_orbax(record: logging.LogRecord) -> bool:
    frames = traceback.walk_tb(record.exc_info[2]) if record.exc_info else ()
    files = [record.pathname, *(frame.f_code.co_filename for frame, _ in frames)]
    message = record.getMessage()
    return not any("orbax" in file for file in files) and "tensorstore_spec" not in message


# Orbax raises each error and also logs it, with a traceback from each of its threads and tasks. The
# raised one becomes a UserError, so drop the log records.
for _name in ("absl", "asyncio"):
    logging.getLogger(_name).addFilter(_not_from_orbax)


@functools.cache
def _silence_aborted_tasks() -> None:
    """Suppresses the tracebacks of Orbax tasks aborted by another task's failure.

    When a read or write fails, concurrent tasks find their event loop closed or never start. Python
    prints a traceback for each, from their threads and at exit, below the actual error.
    """
    raised, unraisable = sys.excepthook, sys.unraisablehook

    def on_raised(kind: Any, error: Any, trace: Any) -> None:
        if "Event loop is closed" not in str(error):
            raised(kind, error, trace)

    def on_unraisable(event: Any) -> None:
        closed = "Event loop is closed" in str(event.exc_value)
        if not closed and not inspect.iscoroutine(event.object):
            unraisable(event)

    sys.excepthook, sys.unraisablehook = on_raised, on_unraisable
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited")


_NAMES = ocp.path.step.standard_name_format()  # a step's folder is its number


def _open_writer(root: epath.Path, save: Save) -> ocp.training.Checkpointer:
    policies = ocp.training.preservation_policies
    keep = [policies.LatestN(save.keep_last)]
    if save.keep_every is not None:
        keep.append(policies.EveryNSteps(save.keep_every))
    try:
        return ocp.training.Checkpointer(
            root,
            preservation_policy=policies.AnyPreservationPolicy(keep),
        )
    except OSError as error:
        raise UserError(
            f"Checkpoints cannot be written to {root}: {_first_line(error)}."
        ) from error


def _flat(tree: Any) -> dict[str, Any]:
    """Path -> leaf of any tree; a path is fields, dict keys and indices joined by '/'."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(map(_key, path)): leaf for path, leaf in leaves}


def _key(entry: Any) -> str:
    # A key of a dict, a field of a named tuple or dataclass, an index of a list or tuple.
    return str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry))))


def checksums(flat: Mapping[str, Any]) -> dict[str, int]:
    """A checksum of each array, equal on any mesh, that changes with any one element.

    The file format detects no flipped bits in incompressible data. Computes one array at a time,
    since on a CPU the sum needs memory of the array's size.
    """
    return {path: int(_sum_of_bits(jnp.asarray(x))) for path, x in flat.items()}


@jax.jit
def _sum_of_bits(x: jax.Array) -> jax.Array:
    """Sums elements as integers, times odd weights by position, modulo 2**32: exact, so independent
    of the order."""
    x = jax.device_put(x, jax.memory.Space.Device)  # it may be offloaded to host memory
    x = x.astype(jnp.uint8) if x.dtype == bool else x
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    position, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        position = position + index * jnp.uint32(stride % 2**32)
        stride = stride * x.shape[axis]
    return jnp.sum(bits * (2 * position + 1), dtype=jnp.uint32)


def _describe(x: Any) -> str:
    return f"{jnp.dtype(x.dtype).name}{list(x.shape)}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].partition(" See full TensorStore")[0].rstrip(".")[:200]


def _is_full(error: BaseException | None) -> bool:
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left" in str(error) or "quota exceeded" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
