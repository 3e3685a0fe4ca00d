"""Token shards: flat files of token ids, the lengths of their documents, and a manifest.

    manifest.json                     recipe, division of each source, counts, checksums
    tokenizer.model
    SOURCE/train-00000.tokens         little-endian uint16, or uint32 above 65,536 pieces;
                                      each document is [begin, t1 .. tn, end]
    SOURCE/train-00000.documents.npy  uint32 [documents, 2]: tokens in all, UTF-8 bytes
    SOURCE/held_out-00000.*
    SOURCE/shard-00000.json           this shard is finished

Shards are cut by the text alone, so they are the same bytes on any number of cores and after any
number of interruptions.
"""

import io
import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from lm.data.division import Division, in_batches
from lm.data.folder import Folder, digest
from lm.data.progress import Progress
from lm.data.sources import AnySource
from lm.data.stream import Stream
from lm.data.tokenizer import Tokenizer
from lm.errors import UserError

SPLITS = ("train", "held_out")
SHARD = 1 << 25  # characters of text
# Bytes: a larger folder is checked by sizes alone, since hashing it would delay every start.
_HASHED = 1 << 28

Entry = dict[str, Any]


def token_dtype(vocab: int) -> np.dtype:
    """The smallest unsigned type, little-endian, that holds every id."""
    return np.dtype("<u2" if vocab <= 1 << 16 else "<u4")


def write(
    folder: Folder,
    name: str,
    source: AnySource,
    division: Division,
    tokenizer: Tokenizer,
    progress: Progress,
) -> list[Entry]:
    """Tokenises a source into shards and says what they hold. A shard that is finished already is
    not made again."""
    entries: list[Entry] = []
    documents = source.documents()
    seen = read = 0  # documents in entries; documents taken from the source
    with progress(f"tokenising {name}", division.bytes) as bar:
        while seen < division.documents:
            entry = _finished(folder, name, len(entries))
            if entry is None:
                next(islice(documents, seen - read, seen - read), None)  # those of finished shards
                entry = _build(folder, name, len(entries), documents, division, tokenizer)
                read = seen + entry["documents"]
            if not entry["documents"]:
                raise UserError(f"data: source {name!r} has changed while it was read; run again.")
            entries.append(entry)
            seen += entry["documents"]
            bar.advance(entry["bytes"])
    return entries


def missing(folder: Folder, entries: list[Entry]) -> bool:
    """Whether a file of the shards is not there. Raises UserError, naming it, if one is there and
    damaged."""
    files = {name: file for entry in entries for name, file in _files(entry).items()}
    if not all(_is_there(folder, name, file["bytes"]) for name, file in files.items()):
        return True
    if sum(file["bytes"] for file in files.values()) < _HASHED and not folder.is_remote:
        for name, file in files.items():
            if digest(folder.read(name)) != file["sha256"]:
                raise UserError(_damaged(folder, name, "its checksum is another"))
    return False


def stream(folder: Folder, entries: list[Entry], split: str, dtype: np.dtype) -> Stream:
    """All tokens of a split. Shards are mapped when first touched; those at a URL are copied to the
    user's cache."""
    parts = [list(entry[split]["files"].items()) for entry in entries if entry[split]["documents"]]
    documents = [np.load(_fetch(folder, *lengths), mmap_mode="r") for _, lengths in parts]

    def open_shard(index: int) -> np.ndarray:
        return np.memmap(_fetch(folder, *parts[index][0]), dtype, mode="r")

    return Stream(documents, open_shard)


def _build(
    folder: Folder,
    name: str,
    number: int,
    documents: Iterator[str],
    division: Division,
    tokenizer: Tokenizer,
) -> Entry:
    dtype = token_dtype(tokenizer.vocab)
    tokens: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    lengths: dict[str, list[tuple[int, int]]] = {split: [] for split in SPLITS}
    entry: Entry = {"documents": 0, "bytes": 0}
    for texts in in_batches(_take(documents, SHARD)):
        entry["documents"] += len(texts)
        for split, parts in zip(SPLITS, zip(*map(division.divide, texts))):
            parts = [part for part in parts if part]
            for part, ids in zip(parts, tokenizer.encode_batch(parts)):
                document = np.empty(len(ids) + 2, dtype)
                document[0], document[1:-1], document[-1] = tokenizer.bos, ids, tokenizer.eos
                tokens[split].append(document)
                lengths[split].append((len(document), len(part.encode())))
    for split in SPLITS:
        entry[split] = _write_split(
            folder, f"{name}/{split}-{number:05}", tokens[split], lengths[split]
        )
        entry["bytes"] += entry[split]["bytes"]
    folder.write(f"{name}/shard-{number:05}.json", json.dumps(entry).encode())
    return entry


def _write_split(
    folder: Folder, stem: str, tokens: list[np.ndarray], lengths: list[tuple[int, int]]
) -> dict[str, Any]:
    counts = {
        "documents": len(lengths),
        "tokens": sum(count - 1 for count, _ in lengths),
        "bytes": sum(size for _, size in lengths),
        "files": {},
    }
    if lengths:
        table = io.BytesIO()
        np.save(table, np.array(lengths, "<u4"))
        for name, data in (
            (f"{stem}.tokens", np.concatenate(tokens).data.cast("B")),
            (f"{stem}.documents.npy", table.getvalue()),
        ):
            folder.write(name, data)
            counts["files"][name] = {"bytes": len(data), "sha256": digest(data)}
    return counts


def _finished(folder: Folder, name: str, number: int) -> Entry | None:
    marker = folder.read(f"{name}/shard-{number:05}.json")
    entry = json.loads(marker) if marker else None
    if entry and all(_is_there(folder, n, file["bytes"]) for n, file in _files(entry).items()):
        return entry
    return None


def _files(entry: Entry) -> dict[str, dict[str, Any]]:
    return {name: file for split in SPLITS for name, file in entry[split]["files"].items()}


def _is_there(folder: Folder, name: str, size: int) -> bool:
    found = folder.size(name)
    if found not in (None, size):
        raise UserError(_damaged(folder, name, f"it has {found:,} bytes and not {size:,}"))
    return found is not None


def _damaged(folder: Folder, name: str, how: str) -> str:
    return (
        f"{folder.where(name)} is damaged: {how}. "
        "Delete it and run the same command again; it is made anew."
    )


def _fetch(folder: Folder, name: str, file: dict[str, Any]) -> str:
    return folder.local(name, file["sha256"])


def _take(documents: Iterator[str], characters: int) -> Iterator[str]:
    taken = 0
    for text in documents:
        yield text
        taken += len(text)
        if taken >= characters:
            return
