"""Checkpoints of a run on Orbax: FOLDER/STEP/ holds the state after STEP updates.

On disk a state is a nested dict of arrays whose keys are the fields, dict keys and indices of the
state ("params/blocks/0/ffn/up", "opt_state/0/mu/..."): no class of this or of another library is
needed to read it. A save writes aside and renames, so a folder with a bare number is complete.
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
    """When to save (each `every` steps, and `minutes` after the last save, whichever comes first)
    and what to keep: the `keep_last` newest, and for good every `keep_every`-th step."""

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

    With a `Save` it writes: opening it removes what an interrupted save left behind. Without, it
    only reads, and may do so while another process trains. All processes of a run call its
    methods at the same steps.
    """

    def __init__(self, folder: epath.PathLike, save: Save | None = None) -> None:
        self.folder = epath.Path(folder)
        # TensorStore wants absolute paths; messages show the path as it was given.
        self._remote = "://" in str(folder)
        self._root = self.folder if self._remote else self.folder.expanduser().absolute()
        self._save = save
        _quiet_leftovers()
        self._saved_at = time.monotonic()
        self._begun: int | None = None  # the step being saved
        self._writer = None
        if save is not None:
            self._remove_torn()
            distributed.barrier("torn checkpoints removed")
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
        """The newest complete checkpoint; None where there is none."""
        return max(self.steps(), default=None)

    def due(self, step: int, now: float) -> bool:
        """Whether the state after `step` updates is to be saved; `now` is time.monotonic()."""
        save = self._writing()
        if save.minutes is None:
            return step % save.every == 0
        waited = now - self._saved_at >= 60 * save.minutes
        return step % save.every == 0 or distributed.agree(waited, step)

    def save(self, step: int, state: Any, metadata: Mapping[str, Any] | None = None) -> None:
        """Begins to save and returns once the arrays are copied to the host: they may be donated
        to the next step at once. Waits for the save before, and tells of its failure.

        `state` is any tree of arrays with a field or key `params`; `metadata` is what JSON holds.
        Older checkpoints are deleted by the keep policy only after this one is complete.
        """
        self._writing()
        self.wait()  # also tells of its failure under its own step
        self._begun = step
        flat = _flat(state)
        beside = {"metadata": dict(metadata or {}), "checksums": _checksums(flat)}
        with self._telling():
            self._writer.save_async(step, trees.unflatten(flat), force=True, custom_metadata=beside)
        self._saved_at = time.monotonic()

    def wait(self) -> None:
        """Until the last save is complete. Raises UserError if it failed, as on a full disk."""
        if self._writer is not None:
            with self._telling():
                self._writer.wait()

    def close(self) -> None:
        """Waits, and ends the threads that save."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            with self._telling():
                writer.close()

    def restore(self, abstract: Any, step: int | None = None) -> Any:
        """The state of `step` (default: the newest), laid out as `abstract` says.

        `abstract` is the state as a tree of jax.ShapeDtypeStruct, each with the sharding it is
        wanted in (without one: the first device), whatever mesh it was saved from. Raises UserError
        if the checkpoint is of another declaration, or damaged.
        """
        step = self._existing(step)
        wanted = _flat(abstract)
        self._check_fits(step, self._stored(step), wanted)
        loaded = self._load(step, wanted)
        return jax.tree.unflatten(jax.tree.structure(abstract), [loaded[path] for path in wanted])

    def restore_params(
        self, step: int | None = None, shardings: Sharding | trees.Tree | None = None
    ) -> dict[str, Any]:
        """Only the parameters of `step` (default: the newest), as a nested dict of arrays.

        Shapes and dtypes come from the checkpoint; `shardings` is one for all, a nested dict of
        them, or None for the first device. The optimizer is neither known nor read.
        """
        step = self._existing(step)
        stored = {p: x for p, x in self._stored(step).items() if p.startswith("params/")}
        if isinstance(shardings, Mapping):
            flat = trees.flatten({"params": shardings})
            for path in [*flat, *stored]:
                if path not in stored or path not in flat:
                    where = "this model" if path in stored else f"checkpoint {step}"
                    raise self._misfit(step, f"{path} is missing in {where}.")
        else:
            flat = dict.fromkeys(stored, shardings)
        wanted = {
            path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=flat[path])
            for path, x in stored.items()
        }
        return trees.unflatten(self._load(step, wanted))["params"]

    def metadata(self, step: int | None = None) -> dict[str, Any]:
        """What was handed to `save` beside the state."""
        step = self._existing(step)
        return self._beside(step).get("metadata", {})

    def _beside(self, step: int) -> dict[str, Any]:
        with self._reading(step):
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
        """Path -> what has the shape and dtype of the array in the checkpoint."""
        with self._reading(step):
            tree = ocp.metadata(self._root / str(step)).metadata
            if tree is None:
                raise ValueError("its arrays are damaged or missing")
            stored = trees.flatten(tree)
        if not any(path.startswith("params/") for path in stored):
            raise self._misfit(step, "it holds no parameters of a run.")
        return stored

    def _check_fits(self, step: int, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        for path in [*wanted, *stored]:
            there, here = (
                _describe(tree[path]) if path in tree else None for tree in (stored, wanted)
            )
            if there is None:
                raise self._misfit(step, f"it has no {path}, which is {here} here.")
            if here is None:
                raise self._misfit(step, f"its {path} of {there} has no place here.")
            if there != here:
                raise self._misfit(step, f"{path} is {there} there and {here} here.")

    def _load(self, step: int, wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
        first = SingleDeviceSharding(jax.local_devices()[0])
        abstract = {
            path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or first)
            for path, x in wanted.items()
        }
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        written = self._beside(step).get("checksums", {})
        with self._reading(step), context:
            loaded = trees.flatten(ocp.load(self._root / str(step), trees.unflatten(abstract)))
            for path, found in _checksums(loaded).items():
                if written.get(path, found) != found:
                    raise ValueError(f"the checksum of {path} is another")
        return loaded

    def _misfit(self, step: int, why: str) -> UserError:
        return UserError(
            f"The checkpoint {self.folder / str(step)} is of another declaration: {why}"
        )

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Whatever fails inside is told as a damaged checkpoint, with the step to fall back to."""
        try:
            yield
        except (UserError, MemoryError):
            raise
        except Exception as error:
            path = self.folder / str(step)
            older = [s for s in self.steps() if s < step]
            raise UserError(
                f"The checkpoint {path} cannot be read ({_first_line(error)}). "
                + (
                    f"Step {older[-1]} is the one before it: delete {path} to go on from there."
                    if older
                    else "There is no older one."
                )
            ) from error

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Whatever fails inside is told in a sentence; what is complete stays."""
        try:
            yield
        except Exception as error:
            self._remove_torn()  # a full disk needs its room back
            latest = self.latest()
            full = _is_full(error)
            why = "the disk is full. Make room" if full else f"{_first_line(error)}. Mend it"
            then = "begins anew" if latest is None else f"continues from step {latest}"
            raise UserError(
                f"The checkpoint of step {self._begun} could not be saved in {self.folder}: "
                f"{why} and run the same command again; it {then}."
            ) from error

    def _remove_torn(self) -> None:
        # Orbax could do it, but in the background, where it races with the first save.
        if not distributed.is_main() or not self._root.is_dir():
            return
        complete = {str(step) for step in self.steps()}
        for path in self._root.iterdir():
            # A bucket has no rename: there a torn save bears the bare number, without a seal.
            unsealed = self._remote and path.name.isdigit() and path.name not in complete
            if ".orbax-checkpoint-tmp" in path.name or unsealed:
                path.rmtree(missing_ok=True)


def _not_raised(record: logging.LogRecord) -> bool:
    frames = traceback.walk_tb(record.exc_info[2]) if record.exc_info else ()
    files = [record.pathname, *(frame.f_code.co_filename for frame, _ in frames)]
    message = record.getMessage()
    return not any("orbax" in file for file in files) and "tensorstore_spec" not in message


# What Orbax logs as errors, pages of traceback from each of its threads and tasks, is raised as
# well and then told in a sentence by UserError.
for _name in ("absl", "asyncio"):
    logging.getLogger(_name).addFilter(_not_raised)


@functools.cache
def _quiet_leftovers() -> None:
    """When a read or a write fails, the tasks at work beside it find their event loop closed, or
    are never begun. Python prints that from their threads and at exit, pages of it, below the
    sentence that tells of the failure itself."""
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


_NAMES = ocp.path.step.standard_name_format()


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
    """Path -> leaf of any tree: fields, dict keys and indices joined by '/'."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(map(_key, path)): leaf for path, leaf in leaves}


def _key(entry: Any) -> str:
    # A key of a dict, a field of a named tuple or dataclass, an index of a list or tuple.
    return str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry))))


def _checksums(flat: Mapping[str, Any]) -> dict[str, int]:
    """Of each array, the same on any mesh; any one changed element changes it. Files do not notice
    a flipped bit: random numbers are stored as they are. One array after another, since on a CPU
    the sum needs memory of the array's size."""
    return {path: int(_sum_of_bits(jnp.asarray(x))) for path, x in flat.items()}


@jax.jit
def _sum_of_bits(x: jax.Array) -> jax.Array:
    """Elements as whole numbers times odd weights by their place, modulo 2**32: exact, so in any
    order."""
    x = jax.device_put(x, jax.memory.Space.Device)  # it may lie in the host's memory
    x = x.astype(jnp.uint8) if x.dtype == bool else x
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    place, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        place, stride = place + index * jnp.uint32(stride % 2**32), stride * x.shape[axis]
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)


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
