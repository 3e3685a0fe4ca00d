"""All that a step changes and a checkpoint keeps, born where it will lie."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lm import model, optim
from lm.parallel import sharding
from lm.precision import Precision, cast


class ScaleState(NamedTuple):
    """Dynamic loss scaling: the factor, and the finite steps since it last changed."""

    scale: jax.Array
    finite_steps: jax.Array


class State(NamedTuple):
    """step         int32, updates so far, skipped ones included
    params       nested dict of arrays in the storage format
    opt_state    of the optax transformation
    loss_scale   ScaleState, or None where the precision needs none
    skipped      int32, updates left out because a gradient or the loss was not finite

    Tokens seen are not kept here: they are a function of the step
    (`data.BatchShape.tokens_before`), exact at any size.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    loss_scale: ScaleState | None
    skipped: jax.Array


def new_state(
    config: model.Config,
    transformation: optax.GradientTransformation,
    precision: Precision,
    key: jax.Array,
) -> State:
    """The state before the first step; to be called under jit (see `init_state`)."""
    return state_of(model.init(config, key), transformation, precision)


def state_of(
    params: Any, transformation: optax.GradientTransformation, precision: Precision
) -> State:
    """The state before the first step of training these float32 parameters."""
    scaling = precision.loss_scale
    return State(
        step=jnp.int32(0),
        params=precision.to_params(params),
        opt_state=transformation.init(params),
        loss_scale=ScaleState(jnp.float32(scaling.initial), jnp.int32(0)) if scaling else None,
        skipped=jnp.int32(0),
    )


def abstract_state(
    config: model.Config,
    transformation: optax.GradientTransformation,
    precision: Precision,
    shardings: State | None = None,
) -> State:
    """The shapes and formats of the state, without computing anything; with `shardings`, placed."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(lambda key: new_state(config, transformation, precision, key), key)
    if shardings is None:
        return state
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
    )


def state_shardings(
    config: model.Config,
    transformation: optax.GradientTransformation,
    precision: Precision,
    mesh: jax.sharding.Mesh,
    rules: sharding.Rules | None = None,
    offload: tuple[str, ...] = (),
) -> State:
    """A NamedSharding for every leaf of the state: the optimizer's lie beside their parameters, in
    the host's memory if `offload` (see lm.parallel.mesh.Place) says so, scalars everywhere."""
    shapes = model.shapes(config)
    params = sharding.weight_shardings(model.axes(config), shapes, mesh, rules)
    copy = sharding.replicated(mesh)
    opt_state = optim.state_shardings(transformation, shapes, params, mesh)
    if "optimizer" in offload:
        arrays = jax.eval_shape(transformation.init, shapes)
        opt_state = jax.tree.map(
            lambda x, s: s.with_memory_kind("pinned_host") if x.ndim else s, arrays, opt_state
        )
    return State(
        step=copy,
        params=params,
        opt_state=opt_state,
        loss_scale=ScaleState(copy, copy) if precision.loss_scale else None,
        skipped=copy,
    )


def init_state(
    config: model.Config,
    transformation: optax.GradientTransformation,
    precision: Precision,
    seed: int,
    mesh: jax.sharding.Mesh,
    rules: sharding.Rules | None = None,
    offload: tuple[str, ...] = (),
) -> State:
    """The state before the first step, each device computing only its own part. The values do not
    depend on the mesh."""
    shardings = state_shardings(config, transformation, precision, mesh, rules, offload)

    def init(seed: jax.Array) -> State:
        return new_state(config, transformation, precision, jax.random.key(seed))

    return jax.jit(init, out_shardings=shardings)(seed)


def init_state_from(
    params: Any,
    transformation: optax.GradientTransformation,
    precision: Precision,
    shardings: State,
) -> State:
    """The state before the first step, with parameters that exist; they lie as `shardings` says,
    and are donated."""

    def init(params: Any) -> State:
        return state_of(cast(params, "float32"), transformation, precision)

    return jax.jit(init, out_shardings=shardings, donate_argnums=0)(params)
