"""The gradient of a whole batch: of all of it at once, or accumulated over micro-batches.

Auxiliary losses depend on statistics of the whole batch. With gradient accumulation a first forward
pass over all micro-batches sums the statistics; in the second pass each micro-batch contributes its
own statistics times the derivative of the auxiliary losses at these sums. By the chain rule that is
the gradient of the whole batch, so the numbers do not depend on the number of micro-batches.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm import model
from lm.errors import UserError
from lm.objectives import Loss
from lm.parallel import sharding
from lm.parallel.mesh import Place
from lm.training.state import ScaleState

LossOf = Callable[[Any, Any, jax.Array], Loss]  # (params, batch, key)
Parts = tuple[Any, jax.Array]  # micro-batches and their numbers, stacked


class Gradient(NamedTuple):
    """Sums over a batch: gradients of the total loss, the factor `scale` that they are multiplied
    by, and the loss itself, with auxiliary losses."""

    grads: Any
    scale: jax.Array
    loss: Loss


def gradient_of(
    config: model.Config,
    loss_of: LossOf,
    params: Any,
    batch: Any,
    scaling: ScaleState | None,
    key: jax.Array,
    place: Place,
) -> Gradient:
    """The gradient summed over the batch: one micro-batch after another, or all in a pipeline."""
    # A float16 gradient of a sum over many tokens would overflow: scale the mean over token slots
    # instead of the sum.
    slots = max(x.size for x in jax.tree.leaves(batch))
    scale = jnp.float32(1) if scaling is None else scaling.scale / slots

    microbatches = 1 if sharding.pipeline_parallel_size() > 1 else place.microbatches
    if microbatches > 1:
        parts = jax.tree.map(lambda x: _split(x, microbatches), batch), jnp.arange(microbatches)
        return _accumulated(config, loss_of, params, parts, scale, key, place.accumulate)

    def scaled(params: Any) -> tuple[jax.Array, Loss]:
        loss = loss_of(params, batch, jax.random.fold_in(key, 0))
        loss = _with_auxiliary(config, loss)
        return loss.total * scale, loss

    grads, loss = jax.grad(scaled, has_aux=True)(params)
    return Gradient(grads, scale, loss)


def _with_auxiliary(config: model.Config, loss: Loss) -> Loss:
    """Adds the auxiliary losses of the statistics to the total and to the metrics."""
    # Means over tokens; times the weight they are sums like the others.
    losses = {
        name: loss.weight * value.astype(jnp.float32)
        for name, value in model.auxiliary(config, loss.statistics)[0].items()
    }
    return loss._replace(total=loss.total + sum(losses.values()), metrics=loss.metrics | losses)


def _accumulated(
    config: model.Config,
    loss_of: LossOf,
    params: Any,
    parts: Parts,
    scale: jax.Array,
    key: jax.Array,
    accumulate: str,
) -> Gradient:
    """The gradient summed over micro-batches, in the format `accumulate`."""

    def loss_of_part(params: Any, part: Parts) -> Loss:
        batch, index = part
        batch = jax.tree.map(sharding.shard_rows, batch)
        return loss_of(params, batch, jax.random.fold_in(key, index))

    slopes = _auxiliary_slopes(config, lambda part: loss_of_part(params, part), parts)

    def scaled(params: Any, part: Parts) -> tuple[jax.Array, Loss]:
        loss = loss_of_part(params, part)
        pairs = zip(jax.tree.leaves(slopes), jax.tree.leaves(loss.statistics), strict=bool(slopes))
        return (loss.total + sum(jnp.vdot(slope, x) for slope, x in pairs)) * scale, loss

    differentiate = jax.grad(scaled, has_aux=True)

    def add(sums: tuple[Any, Loss], part: Parts) -> tuple[tuple[Any, Loss], None]:
        new = differentiate(params, part)
        return jax.tree.map(lambda s, x: s + x.astype(s.dtype), sums, new), None

    grads, loss = jax.eval_shape(differentiate, params, _first(parts))
    zeros = (
        jax.tree.map(lambda g: jnp.zeros(g.shape, accumulate), grads),
        jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), loss),
    )
    (grads, loss), _ = jax.lax.scan(add, zeros, parts)
    return Gradient(grads, scale, _with_auxiliary(config, loss) if loss.statistics else loss)


def _auxiliary_slopes(
    config: model.Config, loss_of_part: Callable[[Parts], Loss], parts: Parts
) -> Any:
    """The derivatives of the batch's auxiliary losses, times its weight, by its statistics; None
    without auxiliary losses. Takes a forward pass over all micro-batches."""

    def auxiliary(statistics: Any) -> jax.Array:
        return sum(model.auxiliary(config, statistics)[0].values(), jnp.float32(0))

    def sums_of(part: Parts) -> tuple[jax.Array, Any]:
        loss = loss_of_part(part)
        return loss.weight, loss.statistics

    shapes = jax.eval_shape(sums_of, _first(parts))
    if not jax.eval_shape(lambda s: model.auxiliary(config, s)[0], shapes[1]):
        return None
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)

    def add(sums: Any, part: Parts) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, sums_of(part)), None

    (weight, statistics), _ = jax.lax.scan(add, zeros, parts)
    return jax.tree.map(lambda slope: weight * slope, jax.grad(auxiliary)(statistics))


def _first(parts: Parts) -> Parts:
    return jax.tree.map(lambda x: x[0], parts)


def _split(x: jax.Array, microbatches: int) -> jax.Array:
    """[B, ...] -> [M, B/M, ...]. Micro-batch m takes the rows m, m + M, ..., so that the rows of
    each device stay on that device."""
    rows, *rest = x.shape
    if rows % microbatches:
        raise UserError(
            f"place.microbatches={microbatches} does not divide batch.sequences={rows}; "
            "choose a divisor of it."
        )
    return x.reshape(rows // microbatches, microbatches, *rest).swapaxes(0, 1)
