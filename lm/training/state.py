"""The training state, created sharded.

The weights of a model are *trainable* or *frozen*. The state holds the trainable ones and their
optimizer state. The frozen ones stand beside it and have neither moments nor gradients: a nested
dict, in which MODELS holds the weights of the other models of the objective, by name.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lm import model, optim, trees
from lm.parallel import sharding
from lm.precision import Precision, cast

ALL = ("**",)  # patterns of the trainable weights: all of them
MODELS = "models"

# Configs of the other models of an objective, by name. None: the weights that training starts from,
# of which only the trainable ones are copied.
Models = Mapping[str, model.Config | None]


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


def own(frozen: Any) -> Any:
    """The frozen weights of the model that trains."""
    return {name: part for name, part in frozen.items() if name != MODELS}


def new_state(
    config: model.Config,
    transformation: optax.GradientTransformation,
    precision: Precision,
    key: jax.Array,
    trainable: tuple[str, ...] = ALL,
    models: Models = MappingProxyType({}),
    params: Any = None,
) -> tuple[State, Any]:
    """(state before the first step, frozen weights). Call it under jit; see `init_state`.

    `params` are float32 weights to start from; those that are missing are drawn. The models of
    other configs are not among the frozen weights yet (see `with_models`).
    """
    params = model.complete(config, params or {}, key)
    scaling = precision.loss_scale
    params, frozen = trees.partition(params, trainable)
    frozen = precision.to_params(frozen)
    copies = {
        name: frozen_copy(params, precision) for name, other in models.items() if other is None
    }
    state = State(
        step=jnp.int32(0),
        params=precision.to_params(params),
        opt_state=transformation.init(params),
        loss_scale=ScaleState(jnp.float32(scaling.initial), jnp.int32(0)) if scaling else None,
        skipped=jnp.int32(0),
    )
    return state, frozen | ({MODELS: copies} if copies else {})


def frozen_copy(params: Any, precision: Precision) -> Any:
    """The weights of a model that does not train, in the format of storage; in that of arithmetic
    if it is bfloat16, which gives the same numbers."""
    is_bf16 = precision.compute == "bfloat16"
    return precision.to_compute(params) if is_bf16 else precision.to_params(params)


def abstract_state(
    config: model.Config,
    transformation: optax.GradientTransformation,
    precision: Precision,
    shardings: tuple[State, Any] | None = None,
    trainable: tuple[str, ...] = ALL,
    models: Models = MappingProxyType({}),
) -> tuple[State, Any]:
    """Shapes and formats of (state, frozen weights); with `shardings`, sharded."""
    key = jax.eval_shape(lambda: jax.random.key(0))

    def new(key: jax.Array) -> tuple[State, Any]:
        state, frozen = new_state(config, transformation, precision, key, trainable, models)
        others = {
            name: frozen_copy(model.init(other, key), precision)
            for name, other in models.items()
            if other is not None
        }
        return state, with_models(frozen, others)

    state = jax.eval_shape(new, key)
    if shardings is None:
        return state
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
    )


def frozen_models(
    config: model.Config, models: Models, frozen: Any, **fields: Any
) -> dict[str, model.Model]:
    """The other models of an objective, by name, with these `fields`. Those without a config of
    their own are copies of the trainable weights beside the frozen ones."""

    def of(other: model.Config | None, params: Any) -> model.Model:
        if other is not None:
            return model.Model(other, params, **fields)
        return model.Model(config, trees.merge(params, own(frozen)), **fields)

    return {name: of(other, frozen[MODELS][name]) for name, other in models.items()}


def with_models(frozen: Any, models: Mapping[str, Any]) -> Any:
    """The frozen weights, with those of other models added."""
    both = frozen.get(MODELS, {}) | dict(models)
    return frozen | ({MODELS: both} if both else {})


def state_shardings(
    config: model.Config,
    transformation: optax.GradientTransformation,
    precision: Precision,
    mesh: jax.sharding.Mesh,
    rules: sharding.Rules | None = None,
    offload: tuple[str, ...] = (),
    trainable: tuple[str, ...] = ALL,
    models: Models = MappingProxyType({}),
) -> tuple[State, Any]:
    """A NamedSharding for every array of (state, frozen weights). The optimizer state is sharded as
    its weights are, in host memory if `offload` says so (see `Place`); scalars are replicated."""
    shapes, _ = trees.partition(model.shapes(config), trainable)
    everything = _weight_shardings(config, precision.to_params, mesh, rules)
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
    others = {
        name: model_shardings(other, precision, mesh, rules)
        for name, other in models.items()
        if other
    }
    starts = {name: params for name, other in models.items() if other is None}
    return state, with_models(frozen, starts | others)


def model_shardings(
    config: model.Config,
    precision: Precision,
    mesh: jax.sharding.Mesh,
    rules: sharding.Rules | None = None,
) -> Any:
    """A NamedSharding for every array of a frozen model."""
    return _weight_shardings(config, lambda params: frozen_copy(params, precision), mesh, rules)


def _weight_shardings(
    config: model.Config,
    cast: Callable[[Any], Any],
    mesh: jax.sharding.Mesh,
    rules: sharding.Rules | None,
) -> Any:
    shapes = jax.eval_shape(cast, model.shapes(config))
    return sharding.weight_shardings(model.axes(config), shapes, mesh, rules)


def init_state(
    config: model.Config,
    transformation: optax.GradientTransformation,
    precision: Precision,
    seed: int,
    shardings: tuple[State, Any],
    trainable: tuple[str, ...] = ALL,
    models: Models = MappingProxyType({}),
    params: Any = None,
) -> tuple[State, Any]:
    """(state before the first step, frozen weights), each device computing only its own part. The
    values do not depend on the mesh.

    `params` are weights to start from, sharded, which are donated; those that are missing are
    drawn. The models of other configs must be added by `with_models`.
    """
    state_shardings, frozen_shardings = shardings
    starts = {n: x for n, x in frozen_shardings.get(MODELS, {}).items() if models[n] is None}
    out = state_shardings, with_models(own(frozen_shardings), starts)

    def init(seed: jax.Array, params: Any) -> tuple[State, Any]:
        key = jax.random.key(seed)
        params = cast(params, "float32")
        return new_state(config, transformation, precision, key, trainable, models, params)

    donated = () if config.quant else 1  # codes cannot take the place of the values
    return jax.jit(init, out_shardings=out, donate_argnums=donated)(seed, params or {})
