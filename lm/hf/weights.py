"""Weights of a Hugging Face folder, born where they will lie: each process reads the parts of its
own devices and nothing else.

An array is put together from the tensors of its layers and experts in memory that the device takes
over or copies, one array after another; so beside the weights themselves no more than one array is
ever held by a host.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Sharding, SingleDeviceSharding

from lm import trees
from lm.errors import UserError
from lm.hf import families, safetensors
from lm.hf.families import Family, Spot
from lm.model import Config
from lm.parallel import distributed

CONFIG, GENERATION = "config.json", "generation_config.json"
_PIECE = 1 << 22  # bytes read at a time: they are transposed while they are in the cache
_ROWS = 8  # transposed at a time
_THREADS = min(16, os.cpu_count() or 1)
# Tables that old files hold and every reader computes anew, and the parts that see.
_LEFT_OUT = ("rotary_emb.inv_freq", "vision_tower.", "vision_model.", "multi_modal_projector.")
# How the text model of a larger one, and a model without its head, name their weights.
_SPELLINGS: tuple[Callable[[str], str], ...] = (
    lambda name: name,
    lambda name: f"language_model.{name}",
    lambda name: name.replace("model.", "model.language_model.", 1),
    lambda name: name.removeprefix("model."),
)


class Pretrained:
    """A Hugging Face folder. Opening it reads its config.json and checks that it is understood.

    given       config.json, of its text model
    generation  generation_config.json, {} where there is none
    family, config  what the model is
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = epath.Path(folder)
        if not is_pretrained(folder):
            raise UserError(f"{folder} is no Hugging Face folder: it has no {CONFIG}.")
        self.given = families.text_part(_json(self.folder / CONFIG))
        generation = self.folder / GENERATION
        self.generation = _json(generation) if generation.exists() else {}
        self.family, self.config = families.read(self.given, str(self.folder / CONFIG))

    @property
    def length(self) -> int:
        """The longest sequence that the model was made for."""
        return self.given.get("max_position_embeddings") or 2048

    def params(
        self,
        shardings: Sharding | trees.Tree | None = None,
        dtype: str | None = None,
        config: Config | None = None,
    ) -> dict[str, Any]:
        """The weights as a nested dict of arrays.

        Args:
            shardings: one for all, a nested dict of them, or None for the first device.
            dtype: None keeps each array in the format in which it is stored.
            config: the same model, with its layers stacked in another way.

        Raises UserError for a missing or damaged file, and for tensors that are not those of the
        model.
        """
        files = safetensors.Files(self.folder)
        groups = self._groups(files, config or self.config)
        first = shardings or SingleDeviceSharding(jax.local_devices()[0])
        flat = trees.flatten(first) if isinstance(first, Mapping) else dict.fromkeys(groups, first)
        with ThreadPoolExecutor(_THREADS) as threads:
            loaded = {
                path: _array(files, group, flat[path], dtype, threads)
                for path, group in groups.items()
            }
        return trees.unflatten(loaded)

    def stored(self) -> set[str]:
        """The formats in which the weights are stored."""
        groups = self._groups(safetensors.Files(self.folder), self.config)
        return {tensor.dtype.name for group in groups.values() for _, tensor in group}

    def _groups(
        self, files: safetensors.Files, config: Config
    ) -> dict[str, list[tuple[Spot, safetensors.Tensor]]]:
        """Each of our paths with the tensors that it is made of; all are there and fit."""
        spots = list(families.spots(self.family, config))
        spelt = next((s for s in _SPELLINGS if s(spots[0].name) in files.tensors), _SPELLINGS[0])
        groups: dict[str, list[tuple[Spot, safetensors.Tensor]]] = {}
        known = set()
        for spot in spots:
            name = spelt(spot.name)
            name = spot.name if name not in files.tensors else name
            tensor = files.tensors.get(name)
            if tensor is None:
                raise UserError(
                    f"{self.folder} has no tensor {name}, which {self.family.architecture} needs."
                )
            if tensor.shape != spot.shape:
                raise UserError(
                    f"{self.folder}: {name} has shape {list(tensor.shape)}, and by {CONFIG} it is "
                    f"{list(spot.shape)}; the two are of different models."
                )
            known.add(name)
            groups.setdefault(spot.path, []).append((spot, tensor))
        for name in files.tensors.keys() - known:
            tied = self.config.tied and name.endswith("lm_head.weight")
            if not tied and not any(part in name for part in _LEFT_OUT):
                raise UserError(
                    f"{self.folder} holds {name}, which {self.family.architecture} with this "
                    f"{CONFIG} has not; it would be lost."
                )
        return groups


def is_pretrained(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder is in the format of Hugging Face."""
    return (epath.Path(folder) / CONFIG).exists()


def write_pretrained(
    folder: Path,
    family: Family,
    config: Config,
    params: trees.Tree,
    shard_bytes: int,
    dtype: str | None = None,
) -> None:
    """Writes the weights into a local folder, tensor by tensor, in files of at most `shard_bytes`.

    `dtype` None keeps the format of each array. All processes call this; the first one writes.
    """
    flat = trees.flatten(params)
    spots = list(families.spots(family, config))
    tensors = {p.name: (p.shape, np.dtype(dtype or flat[p.path].dtype)) for p in spots}
    arrays = (_theirs(spot, flat[spot.path], tensors[spot.name][1]) for spot in spots)
    if distributed.is_main():
        safetensors.write(folder, tensors, arrays, shard_bytes)
    else:
        for _ in arrays:  # takes part in gathering them
            pass


def _theirs(spot: Spot, ours: jax.Array, dtype: np.dtype) -> np.ndarray:
    """One tensor as they write it, on the host."""
    part = _part(ours, spot.before)
    if isinstance(part, jax.Array) and not part.is_fully_addressable:
        part = multihost_utils.process_allgather(part, tiled=True)
    values = np.asarray(part)
    values = values if values.dtype == dtype else values.astype(dtype)
    bits = values.view(f"uint{8 * dtype.itemsize}")  # copied faster than bfloat16
    split = bits.transpose([spot.order.index(axis) for axis in range(len(spot.order))])
    theirs = np.empty(spot.split, bits.dtype)
    _copy(split, theirs)
    return theirs.reshape(spot.shape).view(dtype)


def _part(ours: jax.Array, before: tuple[int, ...]) -> jax.Array | np.ndarray:
    if not before:
        return ours
    if len(ours.sharding.device_set) == 1 and ours.devices().pop().platform == "cpu":
        return np.asarray(ours)[before]  # the same memory
    return _take(ours, before)


@jax.jit
def _take(x: jax.Array, before: tuple[jax.Array, ...]) -> jax.Array:
    # Indices are arguments, so that one program serves all layers and experts.
    return x[before]


def _json(path: epath.Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it is not JSON with fields; fetch it again.")
    return found


def _array(
    files: safetensors.Files,
    group: list[tuple[Spot, safetensors.Tensor]],
    sharding: Sharding,
    dtype: str | None,
    threads: ThreadPoolExecutor,
) -> jax.Array:
    """One array of ours; only what this process's devices hold is read."""
    stored = np.result_type(*{tensor.dtype for _, tensor in group})
    shape = _shape(group)
    spans = {
        _spans(index, shape) for index in sharding.addressable_devices_indices_map(shape).values()
    }
    parts = {span: _empty([stop - start for start, stop in span], stored) for span in spans}
    pieces = [piece for span, out in parts.items() for piece in _pieces(group, span, out)]
    for _ in threads.map(lambda piece: _fill(files, *piece), pieces):
        pass
    array = jax.make_array_from_callback(shape, sharding, lambda index: parts[_spans(index, shape)])
    if dtype is None or array.dtype == dtype:
        return array
    return jax.jit(lambda x: x.astype(dtype), out_shardings=sharding)(array)


def _shape(group: list[tuple[Spot, safetensors.Tensor]]) -> tuple[int, ...]:
    spot = group[0][0]
    stack = tuple(1 + max(at) for at in zip(*(other.before for other, _ in group)))
    return stack + tuple(spot.split[axis] for axis in spot.order)


Spans = tuple[tuple[int, int], ...]


def _spans(index: tuple[slice, ...], shape: tuple[int, ...]) -> Spans:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _empty(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """Memory that begins where a CPU device can take it over without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


Piece = tuple[np.ndarray, Spot, safetensors.Tensor, tuple[slice, ...]]


def _pieces(
    group: list[tuple[Spot, safetensors.Tensor]], span: Spans, out: np.ndarray
) -> Iterator[Piece]:
    """What is to be read of each tensor, and where it goes. The target has the axes of theirs, with
    bracketed dimensions apart."""
    for spot, tensor in group:
        stack, rest = span[: len(spot.before)], span[len(spot.before) :]
        if any(not start <= at < stop for at, (start, stop) in zip(spot.before, stack)):
            continue
        inside = out[tuple(at - start for at, (start, _) in zip(spot.before, stack))]
        target = inside.transpose([spot.order.index(axis) for axis in range(len(spot.order))])
        wanted = [rest[spot.order.index(axis)] for axis in range(len(spot.order))]
        (first, last), *others = wanted
        row = math.prod(spot.split[1:]) * tensor.dtype.itemsize
        step = max(1, _PIECE // row)
        for start in range(first, last, step):
            stop = min(start + step, last)
            index = (slice(start, stop), *(slice(*other) for other in others))
            yield target[start - first : stop - first], spot, tensor, index


def _fill(
    files: safetensors.Files,
    target: np.ndarray,
    spot: Spot,
    tensor: safetensors.Tensor,
    index: tuple[slice, ...],
) -> None:
    rows, others = index[0], index[1:]
    row = math.prod(spot.split[1:]) * tensor.dtype.itemsize
    data = np.empty((rows.stop - rows.start) * row, np.uint8)
    files.read_into(tensor, rows.start * row, data)
    if target.dtype == tensor.dtype:  # whole numbers are copied faster than bfloat16
        bits = np.dtype(f"uint{8 * tensor.dtype.itemsize}")
        target, values = target.view(bits), data.view(bits)
    else:
        values = data.view(tensor.dtype)
    _copy(values.reshape(-1, *spot.split[1:])[(slice(None), *others)], target)


def _copy(values: np.ndarray, target: np.ndarray) -> None:
    """Assigns, a few rows at a time of the axis along which the target is contiguous: faster than
    all at once, since what is written stays in the cache until its lines are full."""
    axis = int(np.argmin(target.strides))
    if axis == values.ndim - 1:
        target[...] = values
        return
    for start in range(0, values.shape[axis], _ROWS):
        rows = (slice(None),) * axis + (slice(start, start + _ROWS),)
        target[rows] = values[rows]
