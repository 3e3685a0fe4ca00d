"""Reads and writes the weights of a Hugging Face folder, sharded: each process reads only the parts
that its own devices hold.

Each array is assembled on the host from the tensors of its layers and experts; a CPU device adopts
that memory, others copy it. Arrays follow one another, so that a host holds at most one array
besides the weights themselves.
"""

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

from lm import terminal, trees
from lm.data.json_files import json_object
from lm.errors import UserError
from lm.hf import families, gemma, safetensors
from lm.hf.family import Family
from lm.hf.tensors import TensorSlice, tensor_slices
from lm.model import Config
from lm.parallel import distributed

CONFIG, GENERATION = "config.json", "generation_config.json"
HEAD, TABLE = "lm_head.weight", "embed_tokens.weight"
_PIECE = 1 << 22  # bytes per read: few enough to be transposed while in the CPU cache
_ROWS = 8  # rows transposed at a time
_THREADS = min(16, os.cpu_count() or 1)
# Position tables in old files, which every reader recomputes, and the vision parts.
_IGNORED = ("rotary_emb.inv_freq", "vision_tower.", "vision_model.", "multi_modal_projector.")
# Tensor names in a plain model, in the text part of a vision model (old and new), and in a model
# without its head.
_SPELLINGS: tuple[Callable[[str], str], ...] = (
    lambda name: name,
    lambda name: f"language_model.{name}",
    lambda name: name.replace("model.", "model.language_model.", 1),
    lambda name: name.removeprefix("model."),
)


class Pretrained:
    """A Hugging Face folder. Opening it reads its config.json and raises UserError for an
    unsupported one.

    Attributes:
      config_json: config.json, of a vision model its text part.
      generation_config: generation_config.json; {} where there is none.
      family, config: the model.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = epath.Path(folder)
        if not is_pretrained(folder):
            raise UserError(f"{folder} is not a Hugging Face folder: it has no {CONFIG}.")
        self.config_json = gemma.text_part(_json(self.folder / CONFIG))
        generation = self.folder / GENERATION
        self.generation_config = _json(generation) if generation.exists() else {}
        where = str(self.folder / CONFIG)
        self.family, self.config = families.read(self.config_json, where)
        if (self.folder / "adapter_config.json").exists():
            raise UserError(
                f"{self.folder} holds an adapter (adapter_config.json) beside the model; merge it "
                "with peft's merge_and_unload(), or remove its files."
            )
        self.files = safetensors.Files(self.folder)
        if self.config.tied and self._has_other_head():
            # As in transformers 5 and vLLM, the weights decide.
            terminal.note(f"{where} ties the embeddings, but {HEAD} differs; it is kept.")
            self.config_json = {**self.config_json, "tie_word_embeddings": False}
            self.family, self.config = families.read(self.config_json, where)

    @property
    def length(self) -> int:
        """The maximum sequence length of the model."""
        length = self.config_json.get("max_position_embeddings")
        length = 2048 if length is None else length
        if type(length) is not int or not 0 < length < 2**31:
            raise UserError(
                f"{self.folder / CONFIG}: max_position_embeddings={length!r} is no number of "
                "tokens; correct it."
            )
        return length

    def params(
        self,
        shardings: Sharding | trees.Tree | None = None,
        dtype: str | None = None,
        config: Config | None = None,
    ) -> dict[str, Any]:
        """Reads the weights as a nested dict of arrays.

        Args:
          shardings: one sharding for all, a nested dict of them, or None for the first device.
          dtype: of all arrays; None keeps each array's stored dtype.
          config: the same model with its layers stacked differently.

        Raises UserError for a missing or damaged file, and for tensors that do not match the model.
        """
        files, groups = self.files, self._groups(config or self.config)
        first = shardings or SingleDeviceSharding(jax.local_devices()[0])
        flat = trees.flatten(first) if isinstance(first, Mapping) else dict.fromkeys(groups, first)
        with ThreadPoolExecutor(_THREADS) as threads:
            loaded = {
                path: _array(files, group, flat[path], dtype, threads)
                for path, group in groups.items()
            }
        return trees.unflatten(loaded)

    def stored_dtypes(self) -> set[str]:
        """The names of the dtypes in which the weights are stored."""
        groups = self._groups(self.config)
        return {tensor.dtype.name for group in groups.values() for _, tensor in group}

    def _has_other_head(self) -> bool:
        """Whether the folder has an output matrix that differs from its embedding."""
        tensors = self.files.tensors
        head = next((tensors[name] for name in tensors if name.endswith(HEAD)), None)
        table = next((tensors[name] for name in tensors if name.endswith(TABLE)), None)
        if head is None or table is None:
            return False
        return not self.files.equal(head, table)

    def _groups(self, config: Config) -> dict[str, list[tuple[TensorSlice, safetensors.Tensor]]]:
        """The tensors of each parameter's path. Checks that all exist and have the right shape."""
        files = self.files
        slices = list(tensor_slices(self.family, config))
        spell = next((s for s in _SPELLINGS if s(slices[0].name) in files.tensors), _SPELLINGS[0])
        groups: dict[str, list[tuple[TensorSlice, safetensors.Tensor]]] = {}
        known = set()
        for part in slices:
            name = spell(part.name)
            name = part.name if name not in files.tensors else name
            tensor = files.tensors.get(name)
            if tensor is None:
                raise UserError(
                    f"{self.folder} has no tensor {name}, which {self.family.architecture} needs."
                )
            if tensor.shape != part.shape:
                raise UserError(
                    f"{self.folder}: {name} has shape {list(tensor.shape)}, but by {CONFIG} it is "
                    f"{list(part.shape)}; weights and {CONFIG} are of different models."
                )
            known.add(name)
            groups.setdefault(part.path, []).append((part, tensor))
        for name in files.tensors.keys() - known:
            tied = self.config.tied and name.endswith(HEAD)
            if not tied and not any(ignored in name for ignored in _IGNORED):
                raise UserError(
                    f"{self.folder} holds {name}, which {self.family.architecture} with this "
                    f"{CONFIG} does not have; importing would lose it."
                )
        return groups


def is_pretrained(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder has the Hugging Face format."""
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

    `dtype` None keeps each array's dtype. All processes call this; the main one writes.
    """
    flat = trees.flatten(params)
    slices = list(tensor_slices(family, config))
    tensors = {s.name: (s.shape, np.dtype(dtype or flat[s.path].dtype)) for s in slices}
    arrays = (_to_tensor(s, flat[s.path], tensors[s.name][1]) for s in slices)
    if distributed.is_main():
        safetensors.write(folder, tensors, arrays, shard_bytes)
    else:
        for _ in arrays:  # gathering an array across hosts involves all processes
            pass


def _to_tensor(part: TensorSlice, param: jax.Array, dtype: np.dtype) -> np.ndarray:
    """One tensor of the folder, on the host."""
    values = _index(param, part.index)
    if isinstance(values, jax.Array) and not values.is_fully_addressable:
        values = multihost_utils.process_allgather(values, tiled=True)
    values = np.asarray(values)
    values = values if values.dtype == dtype else values.astype(dtype)
    bits = values.view(f"uint{8 * dtype.itemsize}")  # copies faster than bfloat16
    split = bits.transpose([part.order.index(axis) for axis in range(len(part.order))])
    tensor = np.empty(part.split, bits.dtype)
    _copy(split, tensor)
    return tensor.reshape(part.shape).view(dtype)


def _index(param: jax.Array, index: tuple[int, ...]) -> jax.Array | np.ndarray:
    if not index:
        return param
    if len(param.sharding.device_set) == 1 and param.devices().pop().platform == "cpu":
        return np.asarray(param)[index]  # without a copy
    return _take(param, index)


@jax.jit
def _take(x: jax.Array, index: tuple[jax.Array, ...]) -> jax.Array:
    # Indices are arguments, so that layers and experts share one compiled function.
    return x[index]


def _json(path: epath.Path) -> dict[str, Any]:
    try:
        return json_object(path.read_bytes(), str(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); fetch it again.") from None


def _array(
    files: safetensors.Files,
    group: list[tuple[TensorSlice, safetensors.Tensor]],
    sharding: Sharding,
    dtype: str | None,
    threads: ThreadPoolExecutor,
) -> jax.Array:
    """One parameter. Reads only what this process's devices hold."""
    stored = {tensor.dtype for _, tensor in group}
    stored_dtype = stored.pop() if len(stored) == 1 else np.dtype("float32")
    shape = _shape(group)
    spans = {
        _spans(index, shape) for index in sharding.addressable_devices_indices_map(shape).values()
    }
    parts = {span: _empty([stop - start for start, stop in span], stored_dtype) for span in spans}
    pieces = [piece for span, out in parts.items() for piece in _pieces(group, span, out)]
    for _ in threads.map(lambda piece: _fill(files, *piece), pieces):
        pass
    array = jax.make_array_from_callback(shape, sharding, lambda index: parts[_spans(index, shape)])
    if dtype is None or array.dtype == dtype:
        return array
    return jax.jit(lambda x: x.astype(dtype), out_shardings=sharding)(array)


def _shape(group: list[tuple[TensorSlice, safetensors.Tensor]]) -> tuple[int, ...]:
    first = group[0][0]
    stack = tuple(1 + max(indices) for indices in zip(*(part.index for part, _ in group)))
    return stack + tuple(first.split[axis] for axis in first.order)


Spans = tuple[tuple[int, int], ...]  # (start, stop) in each dimension of a parameter


def _spans(index: tuple[slice, ...], shape: tuple[int, ...]) -> Spans:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _empty(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """Memory aligned so that a CPU device adopts it without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


Piece = tuple[np.ndarray, TensorSlice, safetensors.Tensor, tuple[slice, ...]]


def _pieces(
    group: list[tuple[TensorSlice, safetensors.Tensor]], span: Spans, out: np.ndarray
) -> Iterator[Piece]:
    """The pieces to read of each tensor, each with its target: a view of `out` with the tensor's
    axes, bracketed dimensions apart."""
    for part, tensor in group:
        stack, rest = span[: len(part.index)], span[len(part.index) :]
        if any(not start <= i < stop for i, (start, stop) in zip(part.index, stack)):
            continue
        inside = out[tuple(i - start for i, (start, _) in zip(part.index, stack))]
        target = inside.transpose([part.order.index(axis) for axis in range(len(part.order))])
        spans = [rest[part.order.index(axis)] for axis in range(len(part.order))]
        (first, last), *others = spans
        row = math.prod(part.split[1:]) * tensor.dtype.itemsize
        step = max(1, _PIECE // row)
        for start in range(first, last, step):
            stop = min(start + step, last)
            index = (slice(start, stop), *(slice(*other) for other in others))
            yield target[start - first : stop - first], part, tensor, index


def _fill(
    files: safetensors.Files,
    target: np.ndarray,
    part: TensorSlice,
    tensor: safetensors.Tensor,
    index: tuple[slice, ...],
) -> None:
    rows, others = index[0], index[1:]
    row = math.prod(part.split[1:]) * tensor.dtype.itemsize
    data = np.empty((rows.stop - rows.start) * row, np.uint8)
    files.read_into(tensor, rows.start * row, data)
    if target.dtype == tensor.dtype:  # integers copy faster than bfloat16
        bits = np.dtype(f"uint{8 * tensor.dtype.itemsize}")
        target, values = target.view(bits), data.view(bits)
    else:
        values = data.view(tensor.dtype)
    _copy(values.reshape(-1, *part.split[1:])[(slice(None), *others)], target)


def _copy(values: np.ndarray, target: np.ndarray) -> None:
    """target[...] = values, a few rows at a time of the target's contiguous axis. Faster than at
    once: cache lines of the target stay in the cache until they are full."""
    axis = int(np.argmin(target.strides))
    if axis == values.ndim - 1:
        target[...] = values
        return
    for start in range(0, values.shape[axis], _ROWS):
        rows = (slice(None),) * axis + (slice(start, start + _ROWS),)
        target[rows] = values[rows]
