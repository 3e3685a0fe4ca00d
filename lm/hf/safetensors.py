"""Reads and writes the safetensors format: eight bytes with the length of a JSON header, the header
(name: dtype, shape, offsets), the bytes of the arrays.

A model is one file, or several with an index. Reads only the requested bytes, directly into the
caller's memory; the pages of a memory-mapped file would add to a process's memory.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import ml_dtypes
import numpy as np

from lm.data.json_files import damaged, json_object
from lm.errors import UserError

DTYPES = {
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_BLOCK = 1 << 22  # numbers compared at a time
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Tensor(NamedTuple):
    """The position of an array's bytes in a file."""

    file: str
    start: int
    dtype: np.dtype
    shape: tuple[int, ...]


class Files:
    """The arrays of a folder, local or at an fsspec URL. Opening reads the headers and raises
    UserError for a missing or damaged file. Of a folder with both forms, the single file is read,
    as in transformers. `name` reads that file instead."""

    def __init__(self, folder: str | os.PathLike[str], name: str | None = None):
        self.folder = str(folder)
        self._fs, self._root = fsspec.core.url_to_fs(os.path.expanduser(self.folder))
        self._local = "://" not in self.folder
        self.tensors: dict[str, Tensor] = {}
        self.names = self._find() if name is None else [name]
        for name in self.names:
            header = self._header(name)
            if twice := self.tensors.keys() & header:
                raise UserError(
                    f"{self.folder} holds {min(twice)} twice, also in {name}; remove the files of "
                    "one version."
                )
            self.tensors |= header

    @property
    def size(self) -> int:
        """Bytes of all arrays."""
        return sum(math.prod(t.shape) * t.dtype.itemsize for t in self.tensors.values())

    def read_into(self, tensor: Tensor, start: int, out: np.ndarray) -> None:
        """Fills `out` (uint8) with a tensor's bytes from its byte `start` on."""
        path, offset = f"{self._root}/{tensor.file}", tensor.start + start
        if not self._local:
            out[:] = np.frombuffer(self._fs.cat_file(path, offset, offset + out.size), np.uint8)
            return
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            view, done = memoryview(out), 0
            while done < out.size:
                count = file.readinto(view[done:])
                if not count:
                    raise UserError(f"{self.folder}/{tensor.file} is truncated; download it again.")
                done += count

    def read(self, tensor: Tensor) -> np.ndarray:
        """A whole array."""
        out = np.empty(math.prod(tensor.shape) * tensor.dtype.itemsize, np.uint8)
        self.read_into(tensor, 0, out)
        return out.view(tensor.dtype).reshape(tensor.shape)

    def equal(self, a: Tensor, b: Tensor) -> bool:
        """Whether two arrays have the same shape and values, also in different dtypes."""
        if a.shape != b.shape:
            return False
        size = math.prod(a.shape)
        for start in range(0, size, _BLOCK):
            count = min(_BLOCK, size - start)
            first, second = (self._values(tensor, start, count) for tensor in (a, b))
            if not np.array_equal(first, second, equal_nan=True):
                return False
        return True

    def _values(self, tensor: Tensor, start: int, count: int) -> np.ndarray:
        width = tensor.dtype.itemsize
        block = np.empty(count * width, np.uint8)
        self.read_into(tensor, start * width, block)
        return block.view(tensor.dtype).astype(np.float32)

    def _find(self) -> list[str]:
        names = {os.path.basename(p.rstrip("/")) for p in self._listed()}
        if SINGLE in names:
            return [SINGLE]
        if INDEX in names:
            where = f"{self.folder}/{INDEX}"
            self._info(f"{self._root}/{INDEX}", where)
            index = json_object(self._fs.cat_file(f"{self._root}/{INDEX}"), where)
            weight_map = index.get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise damaged(where, "it has no weight_map")
            if not all(isinstance(name, str) for name in weight_map.values()):
                raise damaged(where, "its weight_map does not name files")
            indexed = sorted(set(weight_map.values()))
            if missing := [name for name in indexed if name not in names]:
                raise UserError(
                    f"{self.folder}: {INDEX} names {missing[0]}, which is missing; download it."
                )
            return indexed
        other = sorted(name for name in names if name.endswith((".safetensors", ".bin", ".pth")))
        hint = f"; {other[0]} is not a supported format" if other else ""
        raise UserError(f"{self.folder} has neither {SINGLE} nor {INDEX}{hint}.")

    def _listed(self) -> list[str]:
        try:
            return self._fs.ls(self._root, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"There is no folder {self.folder}.") from None

    def _info(self, path: str, where: str) -> dict[str, Any]:
        try:
            info = self._fs.info(path)
        except OSError:
            info = {}
        if info.get("type") != "file":
            raise UserError(f"{where} is no file; fetch it again.")
        return info

    def _header(self, name: str) -> dict[str, Tensor]:
        path, where = f"{self._root}/{name}", f"{self.folder}/{name}"
        info = self._info(path, where)
        size = info["size"]
        length = int.from_bytes(self._fs.cat_file(path, 0, 8), "little") if size >= 8 else 0
        if not 0 < length <= size - 8:
            raise UserError(f"{where} is truncated or not safetensors; download it again.")
        header = json_object(self._fs.cat_file(path, 8, 8 + length), where)
        header.pop("__metadata__", None)
        entries = {tensor: _entry(entry, tensor, where) for tensor, entry in header.items()}
        # The arrays follow one another without holes and overlaps.
        end = 0
        for tensor, (start, stop, _, _) in sorted(entries.items(), key=lambda item: item[1][:2]):
            if start != end:
                raise damaged(where, f"the bytes of {tensor} do not follow those before")
            end = stop
        if 8 + length + end > size:
            raise UserError(
                f"{where} is truncated: it has {size:,} bytes of {8 + length + end:,}; "
                "download it again."
            )
        if 8 + length + end < size:
            raise damaged(where, f"{size - 8 - length - end:,} bytes follow the last tensor")
        return {
            tensor: Tensor(name, 8 + length + start, dtype, shape)
            for tensor, (start, _, dtype, shape) in entries.items()
        }


def _entry(entry: Any, tensor: str, where: str) -> tuple[int, int, np.dtype, tuple[int, ...]]:
    """(start, stop, dtype, shape) of an array in a header."""
    entry = entry if isinstance(entry, dict) else {}
    offsets, shape, code = (entry.get(key) for key in ("data_offsets", "shape", "dtype"))
    are_numbers = all(
        isinstance(each, list) and all(type(n) is int and n >= 0 for n in each)
        for each in (offsets, shape)
    )
    if not are_numbers or len(offsets) != 2 or not isinstance(code, str):
        raise damaged(where, f"the header's entry of {tensor} is not dtype, shape and data_offsets")
    if code not in DTYPES:
        raise UserError(
            f"{where}: {tensor} is stored as {code}; supported are {', '.join(DTYPES)}. "
            "Download the model without quantization."
        )
    start, stop = offsets
    if stop - start != math.prod(shape) * DTYPES[code].itemsize:
        raise UserError(f"{where}: the bytes of {tensor} do not match its shape {tuple(shape)}.")
    return start, stop, DTYPES[code], tuple(shape)


def write(
    folder: Path,
    tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    arrays: Iterable[np.ndarray],
    shard_bytes: int,
    single: str = SINGLE,
) -> None:
    """Writes arrays one at a time into files of at most `shard_bytes`, with an index if there are
    several, else into the file `single`. `tensors` (name: shape, dtype) describes the arrays in
    their order."""
    shards = list(_shards(tensors, shard_bytes))
    remaining = iter(arrays)
    names = (
        [single]
        if len(shards) == 1
        else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    )
    for name, shard in zip(names, shards, strict=True):
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        for tensor in shard:
            size = _bytes(*tensors[tensor])
            shape, dtype = tensors[tensor]
            code = next(code for code, known in DTYPES.items() if known == dtype)
            header[tensor] = {
                "dtype": code,
                "shape": shape,
                "data_offsets": [offset, offset + size],
            }
            offset += size
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)  # aligns the arrays to eight bytes
        with open(folder / name, "wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            for tensor in shard:
                array = np.ascontiguousarray(next(remaining))
                if (array.shape, array.dtype) != tensors[tensor]:
                    raise ValueError(
                        f"{tensor}: {array.dtype}{array.shape} is not {tensors[tensor]}"
                    )
                file.write(memoryview(array.reshape(-1).view(np.uint8)))
    if len(shards) > 1:
        total = sum(_bytes(*entry) for entry in tensors.values())
        weight_map = {tensor: name for name, shard in zip(names, shards) for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def _shards(
    tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]], limit: int
) -> Iterator[list[str]]:
    shard, size = [], 0
    for name, entry in tensors.items():
        if shard and size + _bytes(*entry) > limit:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += _bytes(*entry)
    yield shard


def _bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return math.prod(shape) * dtype.itemsize
