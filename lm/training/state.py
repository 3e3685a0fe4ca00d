"""The training state, created sharded.

The weights of a model are *trainable* or *frozen*. The state holds the trainable ones and their
optimizer state; the frozen ones stand beside it and have neither moments nor gradients.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lm import model, optim, trees
from lm.parallel import sharding
from lm.precision import Precision, cast

ALL = ("**",)  # patterns of the trainable weights: all of them


class ScaleState(NamedTuple):
    """Dynamic loss scaling: the scale, and the number of finite steps since it last changed."""

    scale: jax.Array
    finite_steps: jax.Array


class State(NamedTuple):
    """What a step updates and a checkpoint holds.

    step         int32, number of updates, including skipped ones
    params       nested dict of the trainable weights in the storage format
    opt_state    of the optax transformation
    loss_scale   ScaleState, or None without loss scaling
    skipped      int32, number of updates skipped because the loss or a gradient was not finite

    The number of tokens is a function of the step (`data.BatchShape.tokens_before`).
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
    trainable: tuple[str, ...] = ALL,
) -> tuple[State, Any]:
    """(state before the first step, frozen weights). Call it under jit; see `init_state`."""
    return state_of(model.init(config, key), transformation, precision, trainable)


def state_of(
    params: Any,
    transformation: optax.GradientTransformation,
    precision: Precision,
    trainable: tuple[str, ...] = ALL,
) -> tuple[State, Any]:
    """(state before the first step, frozen weights) of these float32 weights."""
    scaling = precision.loss_scale
    params, frozen = trees.partition(params, trainable)
    state = State(
        step=jnp.int32(0),
        params=precision.to_params(params),
        opt_state=transformation.init(params),
        loss_scale=ScaleState(jnp.float32(scaling.initial), jnp.int32(0)) if scaling else None,
        skipped=jnp.int32(0),
    )
    return state, precision.to_params(frozen)


def abstract_state(
    config: model.Config,
    transformation: optax.GradientTransformation,
    precision: Precision,
    shardings: tuple[State, Any] | None = None,
    trainable: tuple[str, ...] = ALL,
) -> tuple[State, Any]:
    """Shapes and formats of (state, frozen weights); with `shardings`, sharded."""
    key = jax.eval_shape(lambda: jax.random.key(0))

    def new(key: jax.Array) -> tuple[State, Any]:
        return new_state(config, transformation, precision, key, trainable)

    state = jax.eval_shape(new, key)
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
    trainable: tuple[str, ...] = ALL,
) -> tuple[State, Any]:
    """A NamedSharding for every leaf of (state, frozen weights). The optimizer state is sharded as
    its weights are, in host memory if `offload` says so (see `Place`); scalars are replicated."""
    shapes, _ = trees.partition(model.shapes(config), trainable)
    everything = sharding.weight_shardings(model.axes(config), model.shapes(config), mesh, rules)
    params, frozen = trees.partition(everything, trainable)
    copy = sharding.replicated(mesh)
    opt_state = optim.state_shardings(transformation, shapes, params, mesh)
    if "optimizer" in offload:
        arrays = jax.eval_shape(transformation.init, shapes)
        opt_state = jax.tree.map(
            lambda x, s: s.with_memory_kind("pinned_host") if x.ndim else s, arrays, opt_state
        )
    state = State(
        step=copy,
        params=params,
        opt_state=opt_state,
        loss_scale=ScaleState(copy, copy) if precision.loss_scale else None,
        skipped=copy,
    )
    return state, frozen


def init_state(
    config: model.Config,
    transformation: optax.GradientTransformation,
    precision: Precision,
    seed: int,
    shardings: tuple[State, Any],
    trainable: tuple[str, ...] = ALL,
) -> tuple[State, Any]:
    """(state before the first step, frozen weights), each device computing only its own part. The
    values do not depend on the mesh."""

    def init(seed: jax.Array) -> tuple[State, Any]:
        key = jax.random.key(seed)
        return new_state(config, transformation, precision, key, trainable)

    return jax.jit(init, out_shardings=shardings)(seed)


def init_state_from(
    params: Any,
    transformation: optax.GradientTransformation,
    precision: Precision,
    shardings: tuple[State, Any],
    trainable: tuple[str, ...] = ALL,
) -> tuple[State, Any]:
    """(state before the first step, frozen weights) of given weights, which are sharded as
    `shardings` says and are donated."""

    def init(params: Any) -> tuple[State, Any]:
        return state_of(cast(params, "float32"), transformation, precision, trainable)

    return jax.jit(init, out_shardings=shardings, donate_argnums=0)(params)
