"""The safetensors format, read and written piece by piece: eight bytes with the length of a JSON
header, the header (name: dtype, shape, offsets), the bytes of the arrays.

A model is one file, or several with an index. Only the bytes that are asked for are read, straight
into memory of ours: a mapped file would count its pages besides.
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

from lm.errors import UserError

DTYPES = {
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Tensor(NamedTuple):
    """Where an array's bytes are."""

    file: str
    start: int
    dtype: np.dtype
    shape: tuple[int, ...]


class Files:
    """The arrays of a folder, local or at an fsspec URL. Opening reads the headers and checks that
    no file is missing or cut short."""

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = str(folder)
        self._fs, self._root = fsspec.core.url_to_fs(os.path.expanduser(self.folder))
        self._local = "://" not in self.folder
        self.tensors: dict[str, Tensor] = {}
        self.names = self._find()
        for name in self.names:
            self.tensors |= self._header(name)

    @property
    def size(self) -> int:
        """Bytes of all arrays."""
        return sum(math.prod(t.shape) * t.dtype.itemsize for t in self.tensors.values())

    def read_into(self, tensor: Tensor, start: int, out: np.ndarray) -> None:
        """The bytes of a tensor from its byte `start` on, as many as `out` (uint8) takes."""
        path, at = f"{self._root}/{tensor.file}", tensor.start + start
        if not self._local:
            out[:] = np.frombuffer(self._fs.cat_file(path, at, at + out.size), np.uint8)
            return
        with open(path, "rb", buffering=0) as file:
            file.seek(at)
            view, done = memoryview(out), 0
            while done < out.size:
                got = file.readinto(view[done:])
                if not got:
                    raise UserError(f"{self.folder}/{tensor.file} is cut short; fetch it again.")
                done += got

    def _find(self) -> list[str]:
        names = {os.path.basename(p.rstrip("/")) for p in self._listed()}
        if INDEX in names:
            index = self._json(self._fs.cat_file(f"{self._root}/{INDEX}"), INDEX)
            wanted = sorted(set(index.get("weight_map", {}).values()))
            missing = [name for name in wanted if name not in names]
            if missing or not wanted:
                what = missing[0] if missing else "weight_map"
                raise UserError(f"{self.folder}: {INDEX} names {what}, which is missing; fetch it.")
            return wanted
        if SINGLE in names:
            return [SINGLE]
        other = sorted(name for name in names if name.endswith((".safetensors", ".bin", ".pth")))
        hint = f"; it has {other[0]}, which is not read" if other else ""
        raise UserError(f"{self.folder} has neither {SINGLE} nor {INDEX}{hint}.")

    def _listed(self) -> list[str]:
        try:
            return self._fs.ls(self._root, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"There is no folder {self.folder}.") from None

    def _header(self, name: str) -> dict[str, Tensor]:
        path, where = f"{self._root}/{name}", f"{self.folder}/{name}"
        size = self._fs.info(path)["size"]
        length = int.from_bytes(self._fs.cat_file(path, 0, 8), "little") if size >= 8 else 0
        if not 0 < length <= size - 8:
            raise UserError(f"{where} is cut short or no safetensors file; fetch it again.")
        header = self._json(self._fs.cat_file(path, 8, 8 + length), name)
        found, end = {}, 0
        for tensor, entry in header.items():
            if tensor == "__metadata__":
                continue
            start, stop = entry["data_offsets"]
            end = max(end, stop)
            if entry["dtype"] not in DTYPES:
                known = ", ".join(DTYPES)
                raise UserError(
                    f"{where}: {tensor} is stored as {entry['dtype']}; {known} are read, so take "
                    "the folder as it was before quantisation."
                )
            dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
            if stop - start != math.prod(shape) * dtype.itemsize:
                raise UserError(f"{where}: the bytes of {tensor} do not fit its shape {shape}.")
            found[tensor] = Tensor(name, 8 + length + start, dtype, shape)
        if 8 + length + end > size:
            raise UserError(
                f"{where} is cut short: it has {size:,} bytes of {8 + length + end:,}; "
                "fetch it again."
            )
        return found

    def _json(self, data: bytes, name: str) -> dict[str, Any]:
        try:
            found = json.loads(data)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise UserError(f"{self.folder}/{name} is damaged; fetch it again.")
        return found


def write(
    folder: Path,
    tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    arrays: Iterable[np.ndarray],
    shard_bytes: int,
) -> None:
    """Writes arrays in the order of `tensors` (name: shape, dtype), one at a time, into files of at
    most `shard_bytes`, with an index where there are several."""
    shards = list(_shards(tensors, shard_bytes))
    coming = iter(arrays)
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    )
    for name, shard in zip(names, shards, strict=True):
        header, at = {"__metadata__": {"format": "pt"}}, 0
        for tensor in shard:
            size = _bytes(*tensors[tensor])
            shape, dtype = tensors[tensor]
            code = next(code for code, known in DTYPES.items() if known == dtype)
            header[tensor] = {"dtype": code, "shape": shape, "data_offsets": [at, at + size]}
            at += size
        written = json.dumps(header, separators=(",", ":")).encode()
        written += b" " * (-len(written) % 8)  # so that arrays begin at multiples of eight
        with open(folder / name, "wb") as file:
            file.write(len(written).to_bytes(8, "little") + written)
            for tensor in shard:
                array = np.ascontiguousarray(next(coming))
                if (array.shape, array.dtype) != tensors[tensor]:
                    raise ValueError(f"{tensor}: {array.dtype}{array.shape} is not as announced")
                file.write(memoryview(array.reshape(-1).view(np.uint8)))
    if len(shards) > 1:
        total = sum(_bytes(*entry) for entry in tensors.values())
        where = {tensor: name for name, shard in zip(names, shards) for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": where}
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
