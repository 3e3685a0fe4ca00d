"""What a step minimises. An objective is a value whose `loss` returns sums, never means: the step
adds them up and divides once."""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

import kernels_pallas
from lm import model, sharding, trees
from lm.data.batch import Batch
from lm.errors import Refused, check_positive


class Loss(NamedTuple):
    """Sums over a batch, in float32.

    total     scalar, what is minimised, times the weight
    weight    scalar, sum of the label weights
    metrics   name -> scalar, each times the weight
    load      path -> [L?, E], the share of tokens that each expert of an MoE block received, times
              the weight
    """

    total: jax.Array
    weight: jax.Array
    metrics: dict[str, jax.Array]
    load: dict[str, jax.Array]


@dataclass(frozen=True, kw_only=True)
class NextToken:
    """Cross-entropy of the next token plus z_loss * logsumexp**2 (PaLM, arXiv:2204.02311) plus the
    model's own side losses.

    `chunk` is the number of positions whose logits exist at a time; None lets the kernel choose.
    """

    z_loss: float = 0.0
    chunk: int | None = None

    def __post_init__(self) -> None:
        if self.z_loss < 0:
            raise Refused(f"objective.z_loss={self.z_loss!r} must be zero or above.")
        if self.chunk is not None:
            check_positive(**{"objective.chunk": self.chunk})

    def loss(
        self,
        config: model.Config,
        params: trees.Tree,
        batch: Batch,
        *,
        dropout_key: jax.Array | None = None,
        **how: Any,
    ) -> Loss:
        """The loss of `batch`, whose weights say how much each target counts; `how` it is computed
        is for `model.forward`."""
        output = model.forward(
            config,
            params,
            batch.tokens,
            segments_bt=batch.segments,
            positions_bt=batch.positions,
            dropout_key=dropout_key,
            **how,
        )
        total, nll = self._cross_entropy(
            output.hidden_btd,
            model.unembedding(config, params),
            batch.targets,
            batch.weights,
            softcap=config.logit_softcap,
        )
        weight = jnp.sum(batch.weights, dtype=jnp.float32)
        # Side losses are means over tokens; times the weight they are sums like the others.
        side: dict[str, Any] = {
            name: weight * value.astype(jnp.float32) for name, value in output.losses.items()
        }
        load = {path: weight * share for path, share in output.load.items()}
        return Loss(total + sum(side.values()), weight, {"nll": nll, **side}, load)

    def _cross_entropy(
        self, x_btd: jax.Array, w_dv: jax.Array, *rest: jax.Array, softcap: float | None
    ) -> tuple[jax.Array, jax.Array]:
        """(loss, nll), summed. Each device adds up its own tokens, with the output matrix collected
        once before and its gradient summed over devices once after; under automatic sharding both
        would happen for every chunk."""
        compute = functools.partial(
            kernels_pallas.cross_entropy, softcap=softcap, z_loss=self.z_loss, chunk=self.chunk
        )
        if not sharding.many_devices():
            return compute(x_btd, w_dv, *rest)
        tokens = sharding.partition(x_btd.shape[:2], "batch", "seq")
        split = tuple(name for part in tokens for name in sharding.split_over(part))
        if not split:
            return compute(x_btd, w_dv, *rest)
        kept = sharding.split_over(sharding.weight_partition(("embed", "vocab"), w_dv.shape)[0])

        def local(x_btd: jax.Array, w_dv: jax.Array, *rest: jax.Array) -> Any:
            # Said here, the gradient is summed over the other axes after it has been split.
            others = tuple(axis for axis in split if axis not in kept)
            w_dv = jax.lax.pcast(w_dv, others, to="varying") if others else w_dv
            w_dv = _collected(kept, w_dv) if kept else w_dv
            return jax.lax.psum(compute(x_btd, w_dv, *rest), split)

        in_specs = (tokens, PartitionSpec(kept or None), tokens, tokens)
        mapped = sharding.on_each_device(local, in_specs, PartitionSpec(), axes=split)
        return mapped(x_btd, w_dv, *rest)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _collected(axes: tuple[str, ...], w_dv: jax.Array) -> jax.Array:
    """The parts of all devices along these axes, inside shard_map; the gradient is summed into the
    parts."""
    return jax.lax.all_gather(w_dv, axes, axis=0, tiled=True)


def _collected_backward(axes: tuple[str, ...], _: None, dw_dv: jax.Array) -> tuple[jax.Array]:
    dw_dv = jax.lax.psum_scatter(dw_dv, axes, scatter_dimension=0, tiled=True)
    # XLA on TPU fails to move this sum out of the loop over micro-batches, where it would cost a
    # whole gradient on every device; it must not try.
    return (jax.lax.optimization_barrier(dw_dv),)


_collected.defvjp(lambda axes, w_dv: (_collected(axes, w_dv), None), _collected_backward)
