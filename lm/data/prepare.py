"""From a declaration to token shards on disk, in two passes over the text: the first finds the
split and trains the tokenizer, the second tokenizes.

Preparation may be interrupted at any moment and run again. One process writes; with a complete
folder, calls on any process only read.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from lm import trees
from lm.data import mixture, shards
from lm.data.evaluation import Evaluation
from lm.data.folder import Folder, digest
from lm.data.loader import BatchShape, Loader, plan_source
from lm.data.mixture import Mixture
from lm.data.progress import Progress, silent
from lm.data.sources import Shards, Source
from lm.data.split import Split, scan
from lm.data.stream import Stream
from lm.data.tokenizer import Tokenizer, TokenizerConfig
from lm.data.tokenizer_files import has_tokenizer, load_tokenizer
from lm.data.tokenizer_training import Sample
from lm.errors import UserError, check_name

FORMAT = 2  # of the shards: raised when older ones can no longer be read, or hold other tokens


@dataclass(frozen=True)
class Counts:
    """Size of one source and split. `tokens` counts predictions: each document's tokens and its
    end token; `bytes` is UTF-8."""

    documents: int
    tokens: int
    bytes: int


class Prepared:
    """A folder of token shards, ready for training and evaluation.

    tokenizer    the trained or loaded one
    counts       {(source, "train" | "held_out"): Counts}
    names        of the sources
    held_out     names of the sources with held-out text
    fingerprint  changes with the tokenizer, the split or any token
    """

    def __init__(self, folder: Folder, manifest: Mapping[str, Any], weights: mixture.Weights):
        self.tokenizer = _load_tokenizer(folder, manifest)
        content = [manifest["tokenizer"], manifest["shards"]]
        self.fingerprint = digest(json.dumps(content, sort_keys=True).encode())[:16]
        self.names = tuple(manifest["shards"])
        self.counts = {
            (name, split): Counts(
                *(sum(e[split][what] for e in entries) for what in ("documents", "tokens", "bytes"))
            )
            for name, entries in manifest["shards"].items()
            for split in shards.SPLITS
        }
        self.held_out = tuple(n for n in self.names if self.counts[n, "held_out"].documents)
        self._folder = folder
        self._shards = manifest["shards"]
        self._paired = manifest.get("paired", [])  # names of the sources of pairs
        train_tokens = {name: self.counts[name, "train"].tokens for name in self.names}
        self._weights = mixture.phases(weights, train_tokens)

    def loader(self, shape: BatchShape, seed: int) -> Loader:
        """Training batches."""
        streams = {name: self.stream(name, "train") for name in self.names}
        plans = {
            name: plan_source(name, each, shape, self.tokenizer, name in self._paired)
            for name, each in streams.items()
        }
        return Loader(streams, plans, self._weights, shape, seed)

    def evaluation(self, name: str, length: int, sequences: int) -> Evaluation:
        """The held-out documents of a source. Raises UserError if it has none."""
        self.check_held_out(name)
        stream = self.stream(name, "held_out")
        return Evaluation(name, stream, length, sequences, is_paired=name in self._paired)

    def check_held_out(self, name: str) -> None:
        """Raises UserError for a source that is not known or has no held-out documents."""
        check_name("source", name, self.names)
        if name not in self.held_out:
            raise UserError(
                f"Source {name!r} has nothing held out; set held_out=0.05 and prepare it again."
            )

    def texts(self, name: str, split: str = "held_out") -> Iterator[str]:
        """The documents of a source and split as text, decoded from their tokens."""
        stream = self.stream(name, split)
        for start, stop in pairwise(stream.starts.tolist()):
            yield self.tokenizer.decode(stream.read(start, stop).tolist())

    def stream(self, name: str, split: str) -> Stream:
        """All tokens of a source and split."""
        check_name("source", name, self.names)
        dtype = shards.token_dtype(self.tokenizer.vocab)
        return shards.stream(self._folder, self._shards[name], split, dtype)


def prepare(
    source: Source | Mixture | Shards,
    tokenizer: TokenizerConfig | None,
    folder: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
) -> Prepared:
    """Tokenizes text into `folder`, continues an interrupted preparation, or opens a complete one.

    With several processes, let one prepare, then call this on the others.

    Args:
        source: a single source is a mixture of one. Shards are opened where they are.
        tokenizer: may be None for Shards, which have their own.
        folder: local or at an fsspec URL.
        progress: shows progress bars; default: none.

    Raises:
        UserError: text that cannot be read, a folder that was prepared from another recipe, or a
            damaged shard.
    """
    if isinstance(source, Shards):
        return _open(source, tokenizer)
    if tokenizer is None:
        raise UserError("tokenizer=None works only with data.Shards; declare a SentencePiece.")
    sources = _mixture(source)
    target = Folder(folder)
    new_recipe = recipe(sources, tokenizer)
    manifest = _manifest(target) or {"recipe": new_recipe}
    _check_recipe(target, manifest["recipe"], new_recipe)
    if not _is_complete(target, manifest):
        _write(target, manifest, sources, tokenizer, progress or silent)
    return Prepared(target, manifest, sources.weights)


def recipe(source: Source | Mixture | Shards, tokenizer: TokenizerConfig | None) -> dict[str, Any]:
    """Everything that decides the shards, for json.dumps: declarations, and fingerprints of the
    text. Mixture weights are not part of it."""
    if isinstance(source, Shards):
        return {"shards": source.path}
    return _plain(
        {
            "format": FORMAT,
            "tokenizer": tokenizer.recipe() if tokenizer else None,
            "sources": {name: each.recipe() for name, each in _mixture(source).sources.items()},
        }
    )


def _mixture(source: Source | Mixture) -> Mixture:
    if isinstance(source, Mixture):
        return source
    return Mixture(sources={source.label: source})


def _write(
    folder: Folder,
    manifest: dict[str, Any],
    mixed: Mixture,
    tokenizer: TokenizerConfig,
    progress: Progress,
) -> None:
    if "sources" not in manifest or not has_tokenizer(folder.path):
        if folder.size("manifest.json") is None:
            _write_manifest(folder, manifest)  # from now on other recipes are refused
        _scan(folder, manifest, mixed.sources, tokenizer, progress)
        _write_manifest(folder, manifest)
    loaded = _load_tokenizer(folder, manifest)
    manifest["shards"] = {
        name: shards.write(
            folder, name, source, Split(**manifest["sources"][name]), loaded, progress
        )
        for name, source in mixed.sources.items()
    }
    for name, entries in manifest["shards"].items():
        _check_both_splits(name, mixed.sources[name], entries)
    _write_manifest(folder, manifest)


def _scan(
    folder: Folder,
    manifest: dict[str, Any],
    sources: Mapping[str, Source],
    config: TokenizerConfig,
    progress: Progress,
) -> None:
    """First pass: adds the splits and the tokenizer to the manifest, and writes the tokenizer. Each
    source contributes an equal part of the tokenizer's training text."""
    for source in sources.values():
        next(source.documents(), None)  # raises for a wrong field before all of another is read
    splits, texts = {}, []
    for name, source in sources.items():
        sample = None
        if config.sample_bytes:
            sample = Sample(config.sample_bytes // len(sources), config.seed)
        splits[name], sampled = scan(name, source, sample, progress)
        texts.extend(sampled)
    if config.sample_bytes:
        with progress("training the tokenizer", len(texts)) as bar:
            tokenizer = config.build(texts)
            bar.advance(len(texts))
    else:
        tokenizer = config.build(())
    tokenizer.save(folder.path)
    manifest["sources"] = {name: dataclasses.asdict(split) for name, split in splits.items()}
    manifest["paired"] = [name for name, source in sources.items() if source.paired]
    manifest["tokenizer"] = {"vocab": tokenizer.vocab, "sha256": tokenizer.checksum}


def _open(source: Shards, tokenizer: TokenizerConfig | None) -> Prepared:
    folder = Folder(source.path)
    manifest = _manifest(folder)
    if manifest is None:
        raise UserError(f"data.path={source.path!r} is not a folder of token shards.")
    if not _is_complete(folder, manifest):
        raise UserError(f"The token shards in {folder} are not complete; prepare them first.")
    if tokenizer is not None:
        old = manifest["recipe"]
        _check_recipe(folder, old, {**old, "tokenizer": _plain(tokenizer.recipe())})
    return Prepared(folder, manifest, source.weights)


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(value))  # tuples become lists, as in the file


def _check_recipe(folder: Folder, old: dict[str, Any], new: dict[str, Any]) -> None:
    old_flat, new_flat = trees.flatten(old), trees.flatten(new)
    for path in [*new_flat, *old_flat]:
        if old_flat.get(path) != new_flat.get(path):
            field = path.replace("/", ".")
            fix = "Choose another name or --workdir, or delete that folder to prepare it again."
            if path.endswith("/fingerprint"):
                raise UserError(f"{folder} was made from other files ({field} differs). {fix}")
            raise UserError(
                f"{folder} was made with {field}={old_flat.get(path)!r}, "
                f"and this declaration has {new_flat.get(path)!r}. {fix}"
            )


def _is_complete(folder: Folder, manifest: Mapping[str, Any]) -> bool:
    if "shards" not in manifest or not has_tokenizer(folder.path):
        return False
    return not any(shards.missing(folder, entries) for entries in manifest["shards"].values())


def _check_both_splits(name: str, source: Source, entries: list[shards.Entry]) -> None:
    for split in shards.SPLITS if source.held_out else ("train",):
        if not any(entry[split]["documents"] for entry in entries):
            raise UserError(
                f"data: source {name!r} is too small to give a {split} part; "
                "add text, or set held_out=0."
            )


def _load_tokenizer(folder: Folder, manifest: Mapping[str, Any]) -> Tokenizer:
    try:
        tokenizer = load_tokenizer(folder.path)
    except UserError:
        tokenizer = None
    if tokenizer is None or tokenizer.checksum != manifest["tokenizer"]["sha256"]:
        files = ("tokenizer.json", "tokenizer.model")
        name = next((name for name in files if folder.size(name) is not None), files[-1])
        raise UserError(
            f"{folder.path_to(name)} is damaged; delete it and run the same command again."
        )
    return tokenizer


def _manifest(folder: Folder) -> dict[str, Any] | None:
    data = folder.read("manifest.json")
    if not data:
        return None
    try:
        manifest = json.loads(data)
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("recipe"), dict):
        raise UserError(
            f"{folder.path_to('manifest.json')} is damaged; "
            f"delete the folder {folder} to prepare it again."
        )
    return manifest


def _write_manifest(folder: Folder, manifest: Mapping[str, Any]) -> None:
    folder.write("manifest.json", json.dumps(manifest, indent=1).encode())
