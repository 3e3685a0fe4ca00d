"""One update: the gradient of the whole batch, summed over micro-batches and divided once, clipped,
checked, applied."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm import model, optim, trees
from lm.data.batch import Batch
from lm.errors import UserError
from lm.objectives.next_token import Loss, NextToken
from lm.parallel import sharding
from lm.precision import LossScale, Precision, cast
from lm.training.state import ScaleState, State

Metrics = dict[str, jax.Array]  # name -> float32 scalar
Step = Callable[[State, Batch], tuple[State, Metrics]]

# The scale stays within what float32 and float16 can use; outside, the fault is not the scale's.
_SMALLEST_SCALE, _LARGEST_SCALE = 1.0, 2.0**24


class Gradient(NamedTuple):
    """Sums over a batch: `grads` of the total, times `times` (the loss scale's share), and what was
    computed on the way."""

    grads: Any
    times: jax.Array
    loss: Loss


def make_step(
    config: model.Config,
    objective: NextToken,
    optimizer: optim.Optimizer,
    schedule: Callable[[jax.Array], jax.Array],
    precision: Precision,
    *,
    microbatches: int = 1,
    circular_repeats: int = 1,
    remat: str | tuple[str, ...] = "none",
    accumulate: str = "float32",
    offload: tuple[str, ...] = (),
    seed: int = 0,
) -> Step:
    """The pure function step(state, batch) -> (state, metrics), for `compile_step`.

    schedule(step) is the learning rate, `seed` drives dropout; `microbatches`, `circular_repeats`, `remat`,
    `accumulate` and `offload` are those of lm.parallel.mesh.Place. An update whose loss or gradient is not
    finite leaves parameters and optimizer state as they are, counts in `skipped`, and takes its
    step of the schedule.

    Metrics, float32 scalars: loss (what is minimised, per unit of label weight), nll and the
    model's side losses (per unit of label weight), grad_norm (before clipping), param_norm (after
    the update), learning_rate, weight (sum of label weights), tokens (not padding), skipped (0 or
    1), and loss_scale where there is one.
    """
    transformation = optimizer.build(schedule, model.axes(config))
    options = {"remat": remat, "circular_repeats": circular_repeats, "offload": "layers" in offload}

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        compute = precision.to_compute(state.params)
        gradient = _gradient(
            *(config, objective, compute, batch, state.loss_scale, key),
            *(microbatches, accumulate, options),
        )
        loss = gradient.loss
        share = 1 / jnp.where(loss.weight > 0, loss.weight, 1)  # an empty batch has no gradient

        # One multiplication turns the summed, scaled gradient into the clipped mean.
        to_mean = share / gradient.times
        norm = trees.global_norm(gradient.grads) * to_mean
        clip = 1.0 if optimizer.clip_norm is None else jnp.minimum(1, optimizer.clip_norm / norm)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss.total)

        def update(params: Any, opt_state: Any) -> tuple[Any, Any]:
            # Fetched in this branch, it is not there while activations need the memory.
            if "optimizer" in offload:
                opt_state = _moved(opt_state, jax.memory.Space.Device)
            grads = jax.tree.map(lambda g: g.astype(jnp.float32) * (to_mean * clip), gradient.grads)
            params = cast(params, "float32")
            updates, opt_state = transformation.update(grads, opt_state, params, step=state.step)
            params = jax.tree.map(jnp.add, params, updates)
            if "optimizer" in offload:
                opt_state = _moved(opt_state, jax.memory.Space.Host)
            load = jax.tree.map(lambda x: x * share, loss.load)
            return precision.to_params(model.update_balance(config, params, load)), opt_state

        # A branch, not a choice per element: the donated state is then updated in place, where a
        # choice makes XLA keep a copy of all of it.
        params, opt_state = jax.lax.cond(
            finite, update, lambda *unchanged: unchanged, state.params, state.opt_state
        )
        metrics = {
            "loss": loss.total * share,
            **{name: value * share for name, value in loss.metrics.items()},
            "grad_norm": norm,
            "param_norm": trees.global_norm(params),
            "learning_rate": schedule(state.step),
            "weight": loss.weight,
            "tokens": jnp.sum(batch.segments > 0),
            "skipped": ~finite,
        }
        if state.loss_scale is not None:
            metrics["loss_scale"] = state.loss_scale.scale
        new = State(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            loss_scale=_rescale(precision.loss_scale, state.loss_scale, finite),
            skipped=state.skipped + ~finite,
        )
        return new, {name: jnp.asarray(x, jnp.float32) for name, x in metrics.items()}

    return step


def _moved(opt_state: Any, space: jax.memory.Space) -> Any:
    """Its arrays in this memory; numbers stay where they are."""
    return jax.tree.map(lambda x: jax.device_put(x, space) if x.ndim else x, opt_state)


def compile_step(
    step: Step,
    shardings: State,
    mesh: jax.sharding.Mesh,
    rules: sharding.Rules | None = None,
) -> Any:
    """`jax.jit` of a step on a mesh: call it, or `.lower(abstract state, abstract
    batch).compile()`.

    The state is donated: the one passed in must not be used again.
    """

    def on_mesh(state: State, batch: Batch) -> tuple[State, Metrics]:
        with sharding.use(mesh, rules):
            return step(state, batch)

    return jax.jit(
        on_mesh,
        in_shardings=(shardings, sharding.batch_sharding(mesh, rules)),
        out_shardings=(shardings, sharding.replicated(mesh)),
        donate_argnums=0,
    )


def _gradient(
    config: model.Config,
    objective: NextToken,
    params: Any,
    batch: Batch,
    scaling: ScaleState | None,
    key: jax.Array,
    microbatches: int,
    accumulate: str,
    options: dict[str, Any],
) -> Gradient:
    """Summed over the batch, one micro-batch at a time, or all on their way through a pipeline."""
    # A float16 gradient of a sum over many tokens would overflow: scale the mean over token slots
    # instead of the sum.
    times = jnp.float32(1) if scaling is None else scaling.scale / batch.tokens.size

    def scaled(params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Loss]:
        loss = objective.loss(config, params, batch, dropout_key=key, **options)
        return loss.total * times, loss

    differentiate = jax.grad(scaled, has_aux=True)
    if sharding.stages() > 1:
        options = {**options, "microbatches": microbatches, "accumulate": accumulate}
        microbatches = 1
    if microbatches == 1:
        grads, loss = differentiate(params, batch, jax.random.fold_in(key, 0))
        return Gradient(grads, times, loss)

    def add(sums: tuple[Any, Loss], part: tuple[Batch, jax.Array]) -> tuple[tuple[Any, Loss], None]:
        batch, index = part
        batch = Batch(*(sharding.shard(x, "batch", "seq") for x in batch))
        new = differentiate(params, batch, jax.random.fold_in(key, index))
        return jax.tree.map(lambda s, x: s + x.astype(s.dtype), sums, new), None

    parts = _split(batch, microbatches)
    first = Batch(*(x[0] for x in parts))
    grads, loss = jax.eval_shape(differentiate, params, first, key)
    zeros = (
        jax.tree.map(lambda g: jnp.zeros(g.shape, accumulate), grads),
        jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), loss),
    )
    (grads, loss), _ = jax.lax.scan(add, zeros, (parts, jnp.arange(microbatches)))
    return Gradient(grads, times, loss)


def _split(batch: Batch, microbatches: int) -> Batch:
    """[B, T] -> [M, B/M, T]. Micro-batch m takes the rows m, m + M, ...: each device's rows stay on
    that device."""
    rows, length = batch.tokens.shape
    if rows % microbatches:
        raise UserError(
            f"place.microbatches={microbatches} does not divide batch.sequences={rows}; "
            "choose a divisor of it."
        )

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(rows // microbatches, microbatches, length).swapaxes(0, 1)

    return Batch(*(split(x) for x in batch))


def _rescale(
    config: LossScale | None, state: ScaleState | None, finite: jax.Array
) -> ScaleState | None:
    """The loss scale after a step: halved when it was not finite, doubled after enough finite ones
    in a row."""
    if config is None or state is None:
        return None
    finite_steps = jnp.where(finite, state.finite_steps + 1, 0)
    grow = finite_steps == config.growth_interval
    factor = jnp.where(finite, jnp.where(grow, 2.0, 1.0), 0.5)
    scale = jnp.clip(state.scale * factor, _SMALLEST_SCALE, _LARGEST_SCALE)
    return ScaleState(scale, jnp.where(grow, 0, finite_steps))
