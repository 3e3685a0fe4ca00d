"""From a declaration to token shards on disk, in two passes over the text: one for the division and
the tokenizer, one for the tokens.

May be interrupted at any moment and run again. One process writes; once the folder is complete,
calling it anywhere only reads.
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
from lm.data.division import Division, survey
from lm.data.evaluation import Evaluation
from lm.data.folder import Folder, digest
from lm.data.loader import BatchShape, Loader
from lm.data.mixture import Mixture
from lm.data.progress import Progress, silent
from lm.data.sources import AnySource, Shards
from lm.data.stream import Stream
from lm.data.tokenizer import Sample, SentencePiece, Tokenizer
from lm.data.tokenizer_files import TokenizerFile, has_tokenizer, load_tokenizer
from lm.errors import UserError, check_name

FORMAT = 1  # of the shards: raised when older ones can no longer be read


@dataclass(frozen=True)
class Counts:
    """How much there is: `tokens` are predictions, each document's own tokens and its end; `bytes`
    are UTF-8."""

    documents: int
    tokens: int
    bytes: int


class Prepared:
    """A folder of token shards, ready to be trained on and evaluated.

    tokenizer    the trained or given one
    counts       {(source, "train" | "held_out"): Counts}
    names        of the sources
    held_out     those of them of which something is held out
    fingerprint  changes with the tokenizer, the division or any token
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
        train_tokens = {name: self.counts[name, "train"].tokens for name in self.names}
        self._weights = mixture.phases(weights, train_tokens)

    def loader(self, shape: BatchShape, seed: int) -> Loader:
        """Training batches."""
        streams = {name: self.stream(name, "train") for name in self.names}
        plans = {name: shape.packing.plan(s, shape.length) for name, s in streams.items()}
        return Loader(streams, plans, self._weights, shape, seed)

    def evaluation(self, name: str, length: int, sequences: int) -> Evaluation:
        """The held-out documents of a source. Raises UserError if nothing was held out of it."""
        held_out = self.stream(name, "held_out")
        if not held_out.documents:
            raise UserError(
                f"Source {name!r} has nothing held out; set held_out=0.05, and prepare it anew."
            )
        return Evaluation(name, held_out, length, sequences)

    def texts(self, name: str, split: str = "held_out") -> Iterator[str]:
        """The documents of a source and split as text, from their tokens."""
        stream = self.stream(name, split)
        for start, stop in pairwise(stream.starts.tolist()):
            yield self.tokenizer.decode(stream.read(start, stop).tolist())

    def stream(self, name: str, split: str) -> Stream:
        """All tokens of a source and split."""
        check_name("source", name, self.names)
        dtype = shards.token_dtype(self.tokenizer.vocab)
        return shards.stream(self._folder, self._shards[name], split, dtype)


def prepare(
    declared: AnySource | Mixture | Shards,
    tokenizer: SentencePiece | TokenizerFile | None,
    folder: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
) -> Prepared:
    """Tokenises the declared text into `folder`, or goes on where that was interrupted, or reads
    what is complete.

    A single source is a mixture of one. `tokenizer` may be None for Shards, which have theirs.
    Several processes: let one prepare, then call this on the others. Raises UserError for text that
    cannot be read, a folder that was made from another recipe, or a damaged shard.
    """
    if isinstance(declared, Shards):
        return _open(declared, tokenizer)
    if tokenizer is None:
        raise UserError("tokenizer=None works only with data.Shards; declare a SentencePiece.")
    declared = _mixture(declared)
    place = Folder(folder)
    made_from = recipe(declared, tokenizer)
    manifest = _manifest(place) or {"recipe": made_from}
    _check_recipe(place, manifest["recipe"], made_from)
    if not _is_complete(place, manifest):
        _write(place, manifest, declared, tokenizer, progress or silent)
    return Prepared(place, manifest, declared.weights)


def recipe(
    declared: AnySource | Mixture | Shards, tokenizer: SentencePiece | TokenizerFile | None
) -> dict[str, Any]:
    """All that decides the shards, for json.dumps: declarations and fingerprints of the files.
    Weights do not."""
    if isinstance(declared, Shards):
        return {"shards": declared.path}
    return _plain(
        {
            "format": FORMAT,
            "tokenizer": tokenizer.recipe() if tokenizer else None,
            "sources": {n: source.recipe() for n, source in _mixture(declared).sources.items()},
        }
    )


def _mixture(declared: AnySource | Mixture) -> Mixture:
    if isinstance(declared, Mixture):
        return declared
    return Mixture(sources={declared.label: declared})


def _write(
    folder: Folder,
    manifest: dict[str, Any],
    declared: Mixture,
    tokenizer: SentencePiece | TokenizerFile,
    progress: Progress,
) -> None:
    if "sources" not in manifest or not has_tokenizer(folder.path):
        if folder.size("manifest.json") is None:
            _write_manifest(folder, manifest)  # from here on another recipe is refused
        _survey(folder, manifest, declared.sources, tokenizer, progress)
        _write_manifest(folder, manifest)
    trained = _load_tokenizer(folder, manifest)
    manifest["shards"] = {
        name: shards.write(
            folder, name, source, Division(**manifest["sources"][name]), trained, progress
        )
        for name, source in declared.sources.items()
    }
    for name, entries in manifest["shards"].items():
        _check_both_sides(name, declared.sources[name], entries)
    _write_manifest(folder, manifest)


def _survey(
    folder: Folder,
    manifest: dict[str, Any],
    sources: Mapping[str, AnySource],
    tokenizer: SentencePiece | TokenizerFile,
    progress: Progress,
) -> None:
    """Reads all sources, writes the tokenizer, and adds both to the manifest. Each source gives the
    tokenizer an equal share."""
    divisions, texts = {}, []
    for name, source in sources.items():
        sample = None
        if isinstance(tokenizer, SentencePiece):
            sample = Sample(tokenizer.sample_bytes // len(sources), tokenizer.seed)
        divisions[name], drawn = survey(name, source, sample, progress)
        texts.extend(drawn)
    if isinstance(tokenizer, TokenizerFile):
        trained = tokenizer.load()
    else:
        with progress("training the tokenizer", len(texts)) as bar:
            trained = tokenizer.train_on(texts)
            bar.advance(len(texts))
    trained.save(folder.path)
    manifest["sources"] = {name: dataclasses.asdict(d) for name, d in divisions.items()}
    manifest["tokenizer"] = {"vocab": trained.vocab, "sha256": trained.checksum}


def _open(declared: Shards, tokenizer: SentencePiece | TokenizerFile | None) -> Prepared:
    folder = Folder(declared.path)
    manifest = _manifest(folder)
    if manifest is None:
        raise UserError(f"data.path={declared.path!r} is no folder of token shards.")
    if not _is_complete(folder, manifest):
        raise UserError(f"The token shards in {folder} are not complete; prepare them first.")
    if tokenizer is not None:
        made = manifest["recipe"]
        _check_recipe(folder, made, {**made, "tokenizer": _plain(tokenizer.recipe())})
    return Prepared(folder, manifest, declared.weights)


def _plain(recipe: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(recipe))  # tuples become lists, as they do in the file


def _check_recipe(folder: Folder, made: dict[str, Any], wanted: dict[str, Any]) -> None:
    a, b = trees.flatten(made), trees.flatten(wanted)
    for path in [*b, *a]:
        if a.get(path) != b.get(path):
            field = path.replace("/", ".")
            fix = "Choose another name or --workdir, or delete that folder to prepare it anew."
            if path.endswith("/fingerprint"):
                raise UserError(f"{folder} was made from other files ({field} differs). {fix}")
            raise UserError(
                f"{folder} was made with {field}={a.get(path)!r}, "
                f"and this declaration has {b.get(path)!r}. {fix}"
            )


def _is_complete(folder: Folder, manifest: Mapping[str, Any]) -> bool:
    if "shards" not in manifest or not has_tokenizer(folder.path):
        return False
    return not any(shards.missing(folder, entries) for entries in manifest["shards"].values())


def _check_both_sides(name: str, source: AnySource, entries: list[shards.Entry]) -> None:
    wanted = shards.SPLITS if source.held_out else ("train",)
    for split in wanted:
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
            f"{folder.where(name)} is damaged; delete it and run the same command again."
        )
    return tokenizer


def _manifest(folder: Folder) -> dict[str, Any] | None:
    data = folder.read("manifest.json")
    try:
        return json.loads(data) if data else None
    except ValueError:
        raise UserError(
            f"{folder.where('manifest.json')} is damaged; "
            f"delete the folder {folder} to prepare it anew."
        ) from None


def _write_manifest(folder: Folder, manifest: Mapping[str, Any]) -> None:
    folder.write("manifest.json", json.dumps(manifest, indent=1).encode())
