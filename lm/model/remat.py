"""Activation checkpointing (remat) and offload: policies of jax.checkpoint around a layer."""

from collections.abc import Callable
from typing import Any

import jax

Policy = Callable[..., Any]

# Cheaper to recompute than to write and read back.
_ELEMENTWISE = {
    "add", "sub", "mul", "div", "neg", "max", "min", "square", "integer_pow", "sqrt", "rsqrt",
    "exp", "log", "tanh", "erf", "logistic", "cos", "sin", "select_n", "convert_element_type",
    "broadcast_in_dim", "reshape", "transpose", "squeeze", "concatenate", "slice", "split",
    "reduce_sum", "sharding_constraint", "dynamic_slice",
}  # fmt: skip

LAYER_INPUT = "layer"  # the name of a layer's input, for policies of stages and for offloading


def layer_policy(remat: str | tuple[str, ...]) -> Policy | None:
    """Remat policy for one layer. Layer inputs are always saved."""
    policies = jax.checkpoint_policies
    if remat in ("none", "stage"):
        return lambda primitive, *_, **__: primitive.name not in _ELEMENTWISE
    if remat == "block":
        return None
    if remat == "dots":
        named = policies.save_only_these_names("attention")
        return policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, named)
    return policies.save_only_these_names(*([remat] if remat == "attention" else remat))


def stage_policy(remat: str | tuple[str, ...]) -> Policy | None:
    """Remat policy for the layers of a pipeline stage: that of `layer_policy` with layer inputs
    saved, but 'stage' saves nothing."""
    if remat == "stage":
        return None
    inputs = jax.checkpoint_policies.save_only_these_names(LAYER_INPUT)
    policy = layer_policy(remat)
    if policy is None:
        return inputs
    return jax.checkpoint_policies.save_from_both_policies(inputs, policy)


def offload_inputs(policy: Policy | None) -> Policy:
    """`policy`, with layer inputs in host memory between the forward and the backward pass."""
    inputs = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    )

    def both(primitive: Any, *args: Any, **params: Any) -> Any:
        if params.get("name") == LAYER_INPUT or policy is None:
            return inputs(primitive, *args, **params)
        return policy(primitive, *args, **params)

    return both
