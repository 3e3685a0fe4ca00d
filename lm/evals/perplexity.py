"""Loss per token, perplexity and bits per byte of text, each with its standard error.

The per-token losses come from one compiled function; everything after it is float64 on the host.
Padding never counts, and the numbers are those of any batch size and any mesh, up to the rounding
of float32 in the forward pass.
"""

import contextlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import numpy as np

import kernels_pallas
from lm import model
from lm.data.batch import Batch
from lm.errors import UserError, check_positive
from lm.evals.result import Result, ratio
from lm.parallel import sharding
from lm.precision import Precision


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Loss, perplexity and bits per byte of held-out text, measured during training.

    source      which source's held-out documents; None: those of every source, one after another
    every       optimizer steps between evaluations; there is always one at the end
    batches     how many batches of each source at most; None: all there are
    sequences   sequences per batch; None: as many as a training step has
    """

    source: str | None = None
    every: int = 1_000
    batches: int | None = None
    sequences: int | None = None

    def __post_init__(self) -> None:
        limits = {"batches": self.batches, "sequences": self.sequences}
        given = {name: value for name, value in limits.items() if value is not None}
        check_positive(**{f"evals.{name}": v for name, v in {"every": self.every, **given}.items()})


class Evaluation(Protocol):
    """What lm.data prepares: documents cut and packed into batches of one shape.

    name       of the source, as in 'web:held_out'
    bytes_d    bytes of each document's text, [D]
    tokens_d   targets of each document in the whole evaluation, [D]
    iteration  (Batch, documents_bt): the index of each target's document, -1 on padding
    """

    name: str
    bytes_d: np.ndarray
    tokens_d: np.ndarray

    def __iter__(self) -> Iterator[tuple[Batch, np.ndarray]]: ...


def evaluate(
    config: model.Config,
    params: Any,
    evaluation: Evaluation,
    *,
    step: int | None = None,
    batches: int | None = None,
    precision: Precision | None = None,
    chunk: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> list[Result]:
    """'NAME/loss' (nats per token), 'NAME/perplexity' and 'NAME/bits_per_byte' of one evaluation.

    Bits per byte are sum(nll) / ln 2 / bytes. The standard errors take documents to be independent
    (see `result.ratio`). Where there is only one document, they are over the sequences that it was
    cut into instead, and so on the low side, as neighbouring sequences are alike.

    Args:
        params: any floating format; cast to `precision.compute` inside the compiled function.
        step: optimizer steps that `params` have seen, for the record.
        batches: stop after so many. A document met in part counts with that share of its bytes.
        chunk: positions whose logits are alive at a time; None: the kernel chooses.
        mesh: the one on which `params` lie; default: that of the surrounding `sharding.use`. Every
            process calls this with the same evaluation and gets the same results, while its
            devices read their own rows only.

    Raises:
        UserError: an evaluation without a single target.
    """
    mesh = mesh or sharding.active_mesh()
    run = partial(
        _token_losses,
        config=config,
        precision=precision or Precision(),
        chunk=chunk,
        mesh=mesh,
    )
    sums = _Sums(len(evaluation.bytes_d))
    waiting = None
    for batch, documents_bt in itertools.islice(evaluation, batches):
        nll_bt = run(params, _place(batch, mesh))
        # Read one batch behind, so that the device has work while the host adds up.
        if waiting:
            sums.add(*waiting)
        waiting = nll_bt, batch.weights, documents_bt
    if waiting:
        sums.add(*waiting)
    return sums.results(evaluation, step)


def _place(batch: Batch, mesh: jax.sharding.Mesh | None) -> Batch:
    """The batch on the devices, each of which gets its rows."""
    if mesh is None:
        return batch
    rows = sharding.batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, rows, x.__getitem__), batch)


@partial(jax.jit, static_argnames=("config", "precision", "chunk", "mesh"))
def _token_losses(
    params: Any,
    batch: Batch,
    *,
    config: model.Config,
    precision: Precision,
    chunk: int | None,
    mesh: jax.sharding.Mesh | None,
) -> jax.Array:
    """nll_bt in float32, on a mesh with a copy on every device. A static mesh, for jit would not
    notice a change of the surrounding `use`."""
    with contextlib.nullcontext() if mesh is None else sharding.use(mesh):
        params = precision.to_compute(params)
        output = model.forward(
            config,
            params,
            batch.tokens,
            segments_bt=batch.segments,
            positions_bt=batch.positions,
        )
        nll_bt = kernels_pallas.token_losses(
            output.hidden_btd,
            model.unembedding(config, params),
            batch.targets,
            softcap=config.logit_softcap,
            chunk=chunk,
        )
    if mesh is None:
        return nll_bt
    return jax.lax.with_sharding_constraint(nll_bt, sharding.replicated(mesh))


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

    def results(self, evaluation: Evaluation, step: int | None) -> list[Result]:
        met_d = self.tokens_d > 0
        tokens = int(self.tokens_d.sum())
        if not tokens:
            raise UserError(
                f"evaluation {evaluation.name!r} has no text to measure; is the file empty, or the "
                "held-out share too small?"
            )
        nll_c, tokens_c = self.nll_d[met_d], self.tokens_d[met_d]
        share_c = tokens_c / np.asarray(evaluation.tokens_d)[met_d]
        bytes_c = share_c * np.asarray(evaluation.bytes_d)[met_d]
        if len(nll_c) == 1:
            nll_s, tokens_s = np.array(self.nll_s), np.array(self.tokens_s)
            nll_c, tokens_c = nll_s[tokens_s > 0], tokens_s[tokens_s > 0]
            bytes_c = tokens_c * bytes_c.sum() / tokens
        loss, loss_error = ratio(nll_c, tokens_c)
        bits, bits_error = ratio(nll_c / math.log(2), bytes_c)
        perplexity = math.exp(loss)
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
                name=f"{evaluation.name}/{measure}",
                value=value,
                stderr=error,
                count=tokens,
            )
            for measure, (value, error) in values.items()
        ]
