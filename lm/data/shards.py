"""Token shards: flat files of token ids, document lengths, and a manifest.

    manifest.json                     recipe, split of each source, counts, checksums
    tokenizer.model
    SOURCE/train-00000.tokens         little-endian uint16, or uint32 above 65,536 ids;
                                      each document is [begin, t1 .. tn, end]
    SOURCE/train-00000.documents.npy  uint32 [documents, 2]: number of tokens, UTF-8 bytes; a third
                                      column, of a curriculum, has the bits of a float32
    SOURCE/train-00000.weights        uint8 per token, its weight in the loss; only of sources that
                                      say so (`Encoded.weights`)
    SOURCE/held_out-00000.*
    SOURCE/shard-00000.json           marks the shard as finished

Shard boundaries depend on the text alone, so the files are identical for any number of cores and
interruptions.
"""

import io
import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from lm.data.folder import Folder, digest
from lm.data.progress import Progress
from lm.data.sources import Encoded, Source, join
from lm.data.split import Split, in_batches
from lm.data.stream import Stream
from lm.data.tokenizer import Tokenizer
from lm.errors import UserError

SPLITS = ("train", "held_out")
SHARD = 1 << 25  # characters of text
# Bytes: above this only file sizes are checked, since hashing would delay every start.
_MAX_HASHED = 1 << 28

Entry = dict[str, Any]


def token_dtype(vocab: int) -> np.dtype:
    """The smallest little-endian unsigned type that holds every id."""
    return np.dtype("<u2" if vocab <= 1 << 16 else "<u4")


def write(
    folder: Folder,
    name: str,
    source: Source,
    split: Split,
    tokenizer: Tokenizer,
    progress: Progress,
) -> list[Entry]:
    """Tokenizes a source into shards and returns their entries for the manifest. Finished shards
    are kept."""
    entries: list[Entry] = []
    documents = source.documents()
    seen = read = 0  # documents in entries; documents read from the source
    with progress(f"tokenizing {name}", split.bytes, "B") as bar:
        while seen < split.documents:
            entry = _finished(folder, name, len(entries))
            if entry is None:
                next(islice(documents, seen - read, seen - read), None)  # skip finished shards
                entry = _build(folder, name, len(entries), source, documents, split, tokenizer)
                read = seen + entry["documents"]
            if not entry["documents"]:
                raise UserError(f"data: source {name!r} changed while it was read; run again.")
            entries.append(entry)
            seen += entry["documents"]
            bar.advance(entry["bytes"])
    return entries


def missing(folder: Folder, entries: list[Entry]) -> bool:
    """Whether a file of the shards is missing. Raises UserError for a damaged file."""
    files = {name: file for entry in entries for name, file in _files(entry).items()}
    if not all(_exists(folder, name, file["bytes"]) for name, file in files.items()):
        return True
    if sum(file["bytes"] for file in files.values()) < _MAX_HASHED and not folder.is_remote:
        for name, file in files.items():
            if digest(folder.read(name)) != file["sha256"]:
                raise UserError(_damaged(folder, name, "its checksum differs"))
    return False


def stream(folder: Folder, entries: list[Entry], split: str, dtype: np.dtype) -> Stream:
    """All tokens of a split. Shards are memory-mapped on first use; remote ones are copied to the
    user's cache first."""
    parts = [list(entry[split]["files"].items()) for entry in entries if entry[split]["documents"]]
    documents = [np.load(_fetch(folder, *part[1]), mmap_mode="r") for part in parts]

    def open_shard(index: int) -> np.ndarray:
        return np.memmap(_fetch(folder, *parts[index][0]), dtype, mode="r")

    def open_weights(index: int) -> np.ndarray:
        return np.memmap(_fetch(folder, *parts[index][2]), "u1", mode="r")

    has_weights = any(len(part) > 2 for part in parts)
    return Stream(documents, open_shard, open_weights if has_weights else None)


def _build(
    folder: Folder,
    name: str,
    number: int,
    source: Source,
    documents: Iterator[str],
    split: Split,
    tokenizer: Tokenizer,
) -> Entry:
    encoded: dict[str, list[Encoded]] = {side: [] for side in SPLITS}
    entry: Entry = {"documents": 0, "bytes": 0}
    for texts in in_batches(_take(documents, SHARD)):
        entry["documents"] += len(texts)
        for side, parts in zip(SPLITS, zip(*map(split.split, texts))):
            encoded[side] += source.encode([part for part in parts if part], tokenizer)
    for side in SPLITS:
        stem = f"{name}/{side}-{number:05}"
        entry[side] = _write_split(folder, stem, encoded[side], token_dtype(tokenizer.vocab))
        entry["bytes"] += entry[side]["bytes"]
    folder.write(f"{name}/shard-{number:05}.json", json.dumps(entry).encode())
    return entry


def _write_split(
    folder: Folder, stem: str, documents: list[Encoded], dtype: np.dtype
) -> dict[str, Any]:
    counts = {
        "documents": len(documents),
        "tokens": sum(each.losses for each in documents),
        "bytes": sum(each.bytes for each in documents),
        "files": {},
    }
    if documents:
        joined, table = join(documents), io.BytesIO()
        np.save(table, joined.lengths.astype("<u4"))
        contents = {
            f"{stem}.tokens": joined.tokens.astype(dtype).data.cast("B"),
            f"{stem}.documents.npy": table.getvalue(),
        }
        if joined.weights is not None:
            contents[f"{stem}.weights"] = joined.weights.data.cast("B")
        for name, data in contents.items():
            folder.write(name, data)
            counts["files"][name] = {"bytes": len(data), "sha256": digest(data)}
    return counts


def _finished(folder: Folder, name: str, number: int) -> Entry | None:
    marker = folder.read(f"{name}/shard-{number:05}.json")
    if marker is None:
        return None
    try:
        entry = json.loads(marker)
        sizes = {name: file["bytes"] for name, file in _files(entry).items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        return None  # the marker is damaged: the shard is built again
    return entry if all(_exists(folder, *item) for item in sizes.items()) else None


def _files(entry: Entry) -> dict[str, dict[str, Any]]:
    return {name: file for split in SPLITS for name, file in entry[split]["files"].items()}


def _exists(folder: Folder, name: str, size: int) -> bool:
    actual = folder.size(name)
    if actual not in (None, size):
        raise UserError(_damaged(folder, name, f"it has {actual:,} bytes instead of {size:,}"))
    return actual is not None


def _damaged(folder: Folder, name: str, reason: str) -> str:
    return (
        f"{folder.path_to(name)} is damaged: {reason}. "
        "Delete it and run the same command again to rebuild it."
    )


def _fetch(folder: Folder, name: str, file: dict[str, Any]) -> str:
    return folder.local(name, file["sha256"])


def _take(documents: Iterator[str], characters: int) -> Iterator[str]:
    """Documents up to a total of `characters`."""
    total = 0
    for text in documents:
        yield text
        total += len(text)
        if total >= characters:
            return
