"""One optimizer update: the gradient of the whole batch, accumulated over micro-batches and divided
once, clipped, checked for finite values, applied.

Metrics of a step, float32 scalars: loss (what is minimized, per unit of target weight), nll and the
auxiliary losses (per unit of target weight), grad_norm (before clipping), param_norm (after the
update), learning_rate, weight (sum of target weights), tokens (without padding), skipped (0 or 1),
and loss_scale with loss scaling.
"""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from lm import model, optim, trees
from lm.objectives import Loss, Objective
from lm.parallel import sharding
from lm.parallel.mesh import Mesh, Place
from lm.precision import LossScale, Precision, cast
from lm.training.gradient import gradient_of
from lm.training.state import ALL, Models, ScaleState, State, frozen_models, own

Metrics = dict[str, jax.Array]  # name -> float32 scalar
Step = Callable[[State, Any, Any], tuple[State, Metrics]]

# Range of the loss scale that float32 and float16 can use.
_SMALLEST_SCALE, _LARGEST_SCALE = 1.0, 2.0**24


def make_step(
    config: model.Config,
    objective: Objective,
    optimizer: optim.Optimizer,
    schedule: Callable[[jax.Array], jax.Array],
    precision: Precision,
    *,
    place: Place = Place(mesh=Mesh()),  # noqa: B008
    seed: int = 0,
    trainable: tuple[str, ...] = ALL,
    models: Models = MappingProxyType({}),
) -> Step:
    """The pure function step(state, batch, frozen) -> (state, metrics), for `compile_step`.

    An update whose loss or gradient is not finite leaves weights and optimizer state unchanged,
    counts in `skipped`, and still advances the schedule.

    Args:
      schedule: step -> learning rate.
      place: gradient accumulation, remat, offload and the pipeline.
      seed: of dropout and sampling.
      trainable: patterns of the weights that train (see `trees.matches`).
      models: the configs of the other models of the objective.
    """
    axes, _ = trees.partition(model.axes(config), trainable)
    transformation = optimizer.build(schedule, axes)
    options = model.ForwardOptions.of(place)
    offload = "optimizer" in place.offload

    def step(state: State, batch: Any, frozen: Any) -> tuple[State, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        compute = precision.to_compute(state.params)
        constants = precision.to_compute(frozen)
        others = frozen_models(config, models, constants, options=options)

        def loss_of(params: Any, batch: Any, key: jax.Array) -> Loss:
            apply = model.Model(config, trees.merge(params, own(constants)), options=options)
            return objective.loss(apply, batch, key, others)

        gradient = gradient_of(config, loss_of, compute, batch, state.loss_scale, key, place)
        loss = gradient.loss
        share = 1 / jnp.where(loss.weight > 0, loss.weight, 1)  # an empty batch has no gradient
        # One multiplication turns the summed, scaled gradient into the clipped mean.
        to_mean = share / gradient.scale
        norm = trees.global_norm(gradient.grads) * to_mean
        clip = 1.0 if optimizer.clip_norm is None else jnp.minimum(1, optimizer.clip_norm / norm)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss.total)

        def update(params: Any, opt_state: Any) -> tuple[Any, Any]:
            params, opt_state = _apply(
                *(transformation, gradient.grads, to_mean, clip),
                *(params, opt_state, state.step, offload),
            )
            _, load = model.auxiliary(config, loss.statistics)
            return precision.to_params(model.update_balance(config, params, load)), opt_state

        # A branch instead of jnp.where per element: it updates the donated state in place, where
        # jnp.where makes XLA keep a copy.
        params, opt_state = jax.lax.cond(
            finite, update, lambda *unchanged: unchanged, state.params, state.opt_state
        )
        metrics = _per_weight(loss, share) | {
            "grad_norm": norm,
            "param_norm": trees.global_norm(params),
            "learning_rate": schedule(state.step),
            "tokens": objective.tokens(batch),
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


def _apply(
    transformation: Any,
    grads: Any,
    to_mean: jax.Array,
    clip: jax.Array | float,
    params: Any,
    opt_state: Any,
    step: jax.Array,
    offload: bool,
) -> tuple[Any, Any]:
    """(weights in float32, optimizer state) after an update with the clipped mean gradient."""
    # Fetched in the branch that updates, so that it takes no memory during the backward pass.
    if offload:
        opt_state = _move(opt_state, jax.memory.Space.Device)
    grads = jax.tree.map(lambda g: g.astype(jnp.float32) * (to_mean * clip), grads)
    params = cast(params, "float32")
    updates, opt_state = transformation.update(grads, opt_state, params, step=step)
    params = jax.tree.map(jnp.add, params, updates)
    if offload:
        opt_state = _move(opt_state, jax.memory.Space.Host)
    return params, opt_state


def _per_weight(loss: Loss, share: jax.Array) -> Metrics:
    """The loss and its metrics per unit of target weight, and that weight."""
    means = {"loss": loss.total} | loss.metrics
    return {name: value * share for name, value in means.items()} | {"weight": loss.weight}


def _move(opt_state: Any, space: jax.memory.Space) -> Any:
    """Moves its arrays to this memory; scalars stay where they are."""
    return jax.tree.map(lambda x: jax.device_put(x, space) if x.ndim else x, opt_state)


def compile_step(
    step: Step,
    shardings: tuple[State, Any],
    mesh: jax.sharding.Mesh,
    rules: sharding.Rules | None = None,
    batch: Any = None,
) -> Any:
    """`jax.jit` of a step on a mesh: call it with (state, batch, frozen), or
    `.lower(abstract state, abstract batch, abstract frozen).compile()`.

    The state is donated: the one passed in must not be used again. `shardings` are those of (state,
    frozen weights), `batch` is an abstract batch; None if all of its arrays are [B, T].
    """
    state, frozen = shardings
    rows = jax.tree.map(lambda x: sharding.batch_sharding(mesh, rules, x.ndim), batch)

    def on_mesh(state: State, batch: Any, frozen: Any) -> tuple[State, Metrics]:
        with sharding.use(mesh, rules):
            return step(state, batch, frozen)

    return jax.jit(
        on_mesh,
        in_shardings=(state, rows or sharding.batch_sharding(mesh, rules), frozen),
        out_shardings=(state, sharding.replicated(mesh)),
        donate_argnums=0,
    )


def _rescale(
    config: LossScale | None, state: ScaleState | None, finite: jax.Array
) -> ScaleState | None:
    """The loss scale after a step: halved after a non-finite one, doubled after enough finite ones
    in a row."""
    if config is None or state is None:
        return None
    finite_steps = jnp.where(finite, state.finite_steps + 1, 0)
    grow = finite_steps == config.growth_interval
    factor = jnp.where(finite, jnp.where(grow, 2.0, 1.0), 0.5)
    scale = jnp.clip(state.scale * factor, _SMALLEST_SCALE, _LARGEST_SCALE)
    return ScaleState(scale, jnp.where(grow, 0, finite_steps))
