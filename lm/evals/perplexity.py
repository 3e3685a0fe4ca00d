"""Loss per token, perplexity and bits per byte of text, each with its standard error.

One compiled function computes the per-token losses; everything after it is float64 on the host.
Padding does not count, and the numbers are those of any batch size and any mesh, up to rounding of
float32 in the forward pass.
"""

import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import jax
import numpy as np

import kernels_pallas
from lm.data.batch import Batch
from lm.errors import UserError, check_positive
from lm.evals.evaluator import Context, Evaluator
from lm.evals.result import Result, ratio
from lm.model import Model
from lm.parallel import sharding


@dataclass(frozen=True, kw_only=True)
class Perplexity(Evaluator):
    """Loss, perplexity and bits per byte of held-out text, measured during training.

    source      the source whose held-out documents are used; None: those of every source in turn
    batches     most batches of each source; None: all
    sequences   sequences per batch; None: as many as in a training step
    """

    source: str | None = None
    batches: int | None = None
    sequences: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        limits = {"evals.batches": self.batches, "evals.sequences": self.sequences}
        check_positive(**{name: value for name, value in limits.items() if value is not None})

    def evaluate(self, model: Model, context: Context) -> Sequence[Result]:
        names = context.data.held_out if self.source is None else (self.source,)
        sequences = self.sequences or context.batch.sequences_at(0)
        return [
            result
            for name in names
            for result in perplexity(
                model,
                context.data.evaluation(name, context.batch.length, sequences),
                step=context.step,
                batches=self.batches,
            )
        ]

    def sources(self) -> Sequence[str]:
        return () if self.source is None else (self.source,)


class HeldOut(Protocol):
    """Documents cut and packed into batches of one shape, as lm.data prepares them.

    name       of the source, such as 'web:held_out'
    bytes_d    bytes of each document's text, [D]
    tokens_d   targets of each document in the whole evaluation, [D]
    iteration  (Batch, documents_bt): the index of each target's document, -1 on padding
    """

    name: str
    bytes_d: np.ndarray
    tokens_d: np.ndarray

    def __iter__(self) -> Iterator[tuple[Batch, np.ndarray]]: ...


def perplexity(
    model: Model,
    documents: HeldOut,
    *,
    step: int | None = None,
    batches: int | None = None,
    chunk: int | None = None,
) -> list[Result]:
    """'NAME/loss' (nats per token), 'NAME/perplexity' and 'NAME/bits_per_byte' of documents.

    Bits per byte are sum(nll) / ln 2 / bytes. The standard errors treat documents as independent
    (see `result.ratio`). With a single document they are computed over its sequences instead, and
    are too small, since neighbouring sequences are alike.

    Args:
        model: on a mesh, every process calls this with the same documents and gets the same
            results, while its devices read only their own rows.
        step: number of updates of the weights, for the record.
        batches: most batches. A document that is read in part counts with that share of its bytes.
        chunk: positions whose logits are computed at a time; None: the kernel chooses.

    Raises:
        UserError: without a single target.
    """
    losses = partial(_token_losses, chunk=chunk)
    sums = _Sums(len(documents.bytes_d))
    waiting = None
    for batch, documents_bt in itertools.islice(documents, batches and min(batches, sys.maxsize)):
        nll_bt = losses(model, place(batch, model.mesh))
        # Read one batch behind, so that the device works while the host sums.
        if waiting:
            sums.add(*waiting)
        waiting = nll_bt, batch.weights, documents_bt
    if waiting:
        sums.add(*waiting)
    return sums.results(documents, step)


def place(batch: Batch, mesh: jax.sharding.Mesh | None) -> Batch:
    """The batch on the devices, each of which gets its rows."""
    if mesh is None:
        return batch
    rows = sharding.batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, rows, x.__getitem__), batch)


@partial(jax.jit, static_argnames="chunk")
def _token_losses(model: Model, batch: Batch, *, chunk: int | None) -> jax.Array:
    """nll_bt in float32, replicated on a mesh."""
    with model.on_mesh():
        model = model.cast()
        output = model(batch.tokens, segments_bt=batch.segments, positions_bt=batch.positions)
        nll_bt = kernels_pallas.token_losses(
            output.hidden_btd,
            model.unembedding(),
            batch.targets,
            softcap=model.config.logit_softcap,
            chunk=chunk,
        )
    if model.mesh is None:
        return nll_bt
    return jax.lax.with_sharding_constraint(nll_bt, sharding.replicated(model.mesh))


class _Sums:
    """Negative log-likelihoods and counts of targets, in float64, per document and per sequence."""

    def __init__(self, documents: int):
        self.nll_d, self.tokens_d = np.zeros(documents), np.zeros(documents)
        self.nll_s: list[float] = []
        self.tokens_s: list[float] = []

    def add(self, nll_bt: jax.Array, weights_bt: np.ndarray, documents_bt: np.ndarray) -> None:
        counted_bt = (documents_bt >= 0) & (np.asarray(weights_bt) > 0)
        nll_bt = np.where(counted_bt, np.asarray(nll_bt, np.float64), 0)
        documents, size = documents_bt[counted_bt], len(self.nll_d)
        self.nll_d += np.bincount(documents, nll_bt[counted_bt], minlength=size)
        self.tokens_d += np.bincount(documents, minlength=size)
        self.nll_s += nll_bt.sum(axis=1).tolist()
        self.tokens_s += counted_bt.sum(axis=1).tolist()

    def results(self, documents: HeldOut, step: int | None) -> list[Result]:
        read_d = self.tokens_d > 0
        tokens = int(self.tokens_d.sum())
        if not tokens:
            raise UserError(
                f"evaluation {documents.name!r} has no text to measure; is the file empty, or the "
                "held-out share too small?"
            )
        nll_c, tokens_c = self.nll_d[read_d], self.tokens_d[read_d]
        share_c = tokens_c / np.asarray(documents.tokens_d)[read_d]
        bytes_c = share_c * np.asarray(documents.bytes_d)[read_d]
        if len(nll_c) == 1:
            nll_s, tokens_s = np.array(self.nll_s), np.array(self.tokens_s)
            nll_c, tokens_c = nll_s[tokens_s > 0], tokens_s[tokens_s > 0]
            bytes_c = tokens_c * bytes_c.sum() / tokens
        loss, loss_error = ratio(nll_c, tokens_c)
        bits, bits_error = ratio(nll_c / math.log(2), bytes_c)
        with np.errstate(over="ignore"):  # infinity above 709.8 nats
            perplexity = float(np.exp(loss))
        # The delta method: the derivative of exp is exp.
        perplexity_error = None if loss_error is None else perplexity * loss_error
        values = {
            "loss": (loss, loss_error),
            "perplexity": (perplexity, perplexity_error),
            "bits_per_byte": (bits, bits_error),
        }
        return [
            Result(
                step=step,
                name=f"{documents.name}/{measure}",
                value=value,
                stderr=error,
                count=tokens,
            )
            for measure, (value, error) in values.items()
        ]
