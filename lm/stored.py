"""Numbers of frozen models, computed once for each sequence before the first update and kept in the
run folder, for objectives with `stored_fields`.

    RUN/stored/train/00000.npy    a record for each sequence that training reads, by source and
                                  number: a structured array of the stored fields, [T, ...] each
    RUN/stored/train/00000.json   marks the part as finished
    RUN/stored/held_out/SOURCE/   the same of the sequences that evals.Validation reads
"""

import bisect
import functools
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from lm import checkpoint, data, evals, terminal, training, trees
from lm.data.batch import extend
from lm.data.folder import Folder, digest
from lm.data.progress import silent
from lm.errors import UserError
from lm.model import ForwardOptions, Model
from lm.objectives import START
from lm.parallel import distributed, sharding
from lm.program import Program
from lm.start import Start, check_models, read_model

# Most of a part, which is computed again if the run is killed in it.
PART_BYTES, PART_BATCHES = 2**26, 64
_OPEN = 256  # parts mapped at a time: each takes a file descriptor


class Group(NamedTuple):
    """Sequences in one folder, numbered from 0; `read` returns those of some numbers as a batch."""

    folder: str
    size: int
    read: Callable[[Sequence[int]], Any]


class Stored:
    """The batches of a run, with the stored fields of its objective, if it has any.

    Raises UserError for a model that was trained with another tokenizer, if it is still needed.
    """

    def __init__(self, program: Program, prepared: data.Prepared, run: epath.Path) -> None:
        e = program.experiment
        self.loader = prepared.loader(e.batch, e.seed)
        self._program = program
        self._folder = Folder(os.fspath(run / "stored"))
        formats = e.objective.stored_fields()
        self._record = np.dtype(
            [(name, each.base, (e.batch.length, *each.shape)) for name, each in formats.items()]
        )
        self._places = self.loader.places_before(program.schedule.steps) if formats else []
        self._groups = tuple(self._find_groups(prepared)) if formats else ()
        fitting = PART_BYTES // max(1, e.batch.sequences * self._record.itemsize)
        self._per_part = e.batch.sequences * min(max(fitting, 1), PART_BATCHES)
        self._open = functools.lru_cache(_OPEN)(self._open_part)
        self._complete = not distributed.any_process(
            any(self._is_missing(*part) for part in self._parts())
        )
        if not self._complete:
            check_models(e.objective.models().values(), prepared.tokenizer)

    def batch(self, step: int, rows: slice) -> Any:
        """These rows of the global batch of a step, as numpy arrays."""
        places = self.loader.places(step, rows)
        batch = self.loader.read(places)
        if not self._groups:
            return batch
        numbers = [bisect.bisect_left(self._places, place) for place in places]
        return extend(batch, self._read("train", numbers))

    def held_out(self, documents: evals.HeldOut) -> evals.HeldOut:
        """Held-out documents, with the stored fields in their batches."""
        return _HeldOut(documents, self._read) if self._groups else documents

    def compute(self, workdir: str | os.PathLike, resumes: bool) -> None:
        """Computes what is missing. The models are in memory only meanwhile.

        Raises UserError if the run resumes, and a model has changed since it was begun.
        """
        if self._complete:
            return
        is_main, paths = distributed.is_main(), self._program.experiment.objective.models()
        sequences = sum(group.size for group in self._groups)
        if is_main:
            size = terminal.size(sequences * self._record.itemsize)
            terminal.note(f"Numbers of {sequences:,} sequences go to {self._folder}: {size}.")
        models = {name: self._model(path, workdir) for name, path in paths.items()}
        checksums = {name: _checksum(each.params) for name, each in models.items()}
        if resumes:
            self._check_unchanged(checksums)
        compute = functools.partial(self._compiled(), models)
        progress = terminal.progress if is_main else silent
        with progress(f"storing {' and '.join(paths)}", sequences) as bar:
            for group, part, numbers in self._parts():
                if distributed.any_process(self._is_missing(group, part, numbers, checksums)):
                    records = self._records(group, numbers, compute)
                    if is_main:
                        facts = {"first": numbers.start, "models": checksums}
                        self._write(_name(group.folder, part), records, facts)
                bar.advance(len(numbers))
        distributed.barrier("numbers stored")
        self._complete = True

    def _find_groups(self, prepared: data.Prepared) -> Iterator[Group]:
        e, places = self._program.experiment, self._places
        yield Group("train", len(places), lambda rows: self.loader.read([places[r] for r in rows]))
        sizes: dict[str, int] = {}
        for evaluator in e.evals:
            if isinstance(evaluator, evals.Validation):
                for name, size in evaluator.sequences_read(prepared, e.batch).items():
                    sizes[name] = max(size, sizes.get(name, 0))
        for name, size in sizes.items():
            one_by_one = prepared.evaluation(name, e.batch.length, 1)

            def read(rows: Sequence[int], batch: Any = one_by_one.batch) -> Any:
                batches = [batch(row)[0] for row in rows]
                return type(batches[0])(*map(np.concatenate, zip(*batches)))

            yield Group(f"held_out/{name}", size, read)

    def _parts(self) -> Iterator[tuple[Group, int, range]]:
        """(group, number of the part, numbers of its sequences)."""
        for group in self._groups:
            for part, first in enumerate(range(0, group.size, self._per_part)):
                yield group, part, range(first, min(first + self._per_part, group.size))

    def _is_missing(
        self, group: Group, part: int, numbers: range, checksums: Mapping[str, int] | None = None
    ) -> bool:
        """Whether a part is not on disk, or not of models with these checksums."""
        name = _name(group.folder, part)
        marker = self._marker(name)
        return (
            marker.get("first") != numbers.start
            or marker["sequences"] < len(numbers)
            or self._folder.size(f"{name}.npy") != marker["bytes"]
            or checksums not in (None, marker["models"])
        )

    def _check_unchanged(self, checksums: Mapping[str, int]) -> None:
        for group, part, _ in self._parts():
            before = self._marker(_name(group.folder, part)).get("models", checksums)
            for name, path in self._program.experiment.objective.models().items():
                if before[name] != checksums[name]:
                    raise UserError(
                        f"objective.{name}={path!r} has changed since the run was begun; bring it "
                        "back as it was, or begin another run with --set name=NAME."
                    )

    def _marker(self, name: str) -> dict[str, Any]:
        """Facts about a part; {} if it is not finished."""
        try:
            return json.loads(self._folder.read(f"{name}.json") or "{}")
        except ValueError:  # damaged: the part is computed again
            return {}

    def _model(self, path: str, workdir: str | os.PathLike) -> Model:
        program = self._program
        if path != START:
            return read_model(program, path)
        e = program.experiment
        start = Start.of(e, workdir)
        state, frozen = start.state(program) if start else program.init()
        return Model(e.model, trees.merge(state.params, training.own(frozen)))

    def _compiled(self) -> Callable[[Mapping[str, Model], Any], dict[str, jax.Array]]:
        """(models, batch) -> stored fields, a copy on each device."""
        program = self._program
        e, mesh = program.experiment, program.mesh
        fields = {"precision": e.precision, "options": ForwardOptions.of(program.place)}

        def compute(models: Mapping[str, Model], batch: Any) -> dict[str, jax.Array]:
            frozen = {name: each.replace(**fields).cast() for name, each in models.items()}
            with sharding.use(mesh, program.rules):
                return e.objective.precompute(e.model, batch, frozen)

        return jax.jit(compute, out_shardings=sharding.replicated(mesh))

    def _records(
        self, group: Group, numbers: range, compute: Callable[[Any], dict[str, jax.Array]]
    ) -> np.ndarray:
        """Computes a part, in batches as large as those of the training step."""
        place, rows = self._program.place, self._program.experiment.batch.sequences
        if place.mesh.pipe == 1:
            rows //= place.microbatches
        batches = [numbers[first : first + rows] for first in range(0, len(numbers), rows)]

        def put(index: int) -> Any:
            each = batches[index]
            padded = [*each, *[each[-1]] * (rows - len(each))]
            return self._program.put(lambda rows: group.read(padded[rows]), rows)

        records = np.zeros(len(numbers), self._record)
        with data.prefetch(put, 0, len(batches)) as ahead:
            for index, batch in enumerate(ahead):
                span = slice(index * rows, index * rows + len(batches[index]))
                for name, values in compute(batch).items():
                    records[name][span] = np.asarray(values)[: len(batches[index])]
        return records

    def _write(self, name: str, records: np.ndarray, facts: Mapping[str, Any]) -> None:
        file = io.BytesIO()
        np.save(file, records)
        content = file.getbuffer()
        marker = {
            "sequences": len(records),
            "bytes": len(content),
            "sha256": digest(content),
            **facts,
        }
        self._folder.write(f"{name}.npy", content)
        self._folder.write(f"{name}.json", json.dumps(marker).encode())

    def _open_part(self, name: str) -> np.ndarray:
        path = self._folder.local(f"{name}.npy", self._marker(name)["sha256"])
        return np.load(path, mmap_mode="r")

    def _read(self, folder: str, numbers: Sequence[int]) -> dict[str, np.ndarray]:
        """The stored fields of these sequences; zeros for those beyond the last."""
        (size,) = (group.size for group in self._groups if group.folder == folder)
        records = np.zeros(len(numbers), self._record)
        for row, number in enumerate(numbers):
            if number < size:
                part, index = divmod(number, self._per_part)
                records[row] = self._open(_name(folder, part))[index]
        return {name: records[name] for name in self._record.names}


class _HeldOut:
    """Held-out documents whose batches have the fields that `read(folder, numbers)` returns."""

    def __init__(self, documents: evals.HeldOut, read: Callable[..., dict[str, np.ndarray]]):
        self.name = documents.name
        self.bytes_d, self.tokens_d = documents.bytes_d, documents.tokens_d
        self._documents, self._read = documents, read

    def __iter__(self) -> Iterator[tuple[Any, np.ndarray]]:
        first = 0
        for batch, documents_bt in self._documents:
            numbers = range(first, first := first + len(batch.tokens))
            yield extend(batch, self._read(f"held_out/{self.name}", numbers)), documents_bt


def _name(folder: str, part: int) -> str:
    return f"{folder}/{part:05}"


def _checksum(params: Any) -> int:
    """Of all weights; equal on any mesh."""
    arrays = dict(enumerate(jax.tree.leaves(params)))
    return sum(checkpoint.checksums(arrays).values()) % 2**32
