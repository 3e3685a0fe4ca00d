"""Cross-entropy over full logits [B, T, V]: the specification of the chunked implementation."""

import jax
import jax.numpy as jnp


def logits(x_btd: jax.Array, w_dv: jax.Array, softcap: float | None = None) -> jax.Array:
    """logits_btv in float32."""
    z_btv = jnp.einsum("btd,dv->btv", x_btd, w_dv, preferred_element_type=jnp.float32)
    return z_btv if softcap is None else softcap * jnp.tanh(z_btv / softcap)


def cross_entropy(
    x_btd: jax.Array,
    w_dv: jax.Array,
    targets_bt: jax.Array,
    weights_bt: jax.Array,
    *,
    softcap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Returns (loss_sum, nll_sum). Arguments as in `kernels_pallas.cross_entropy`."""
    z_btv = logits(x_btd, w_dv, softcap)
    lse_bt = jax.nn.logsumexp(z_btv, axis=-1)
    nll_bt = lse_bt - jnp.take_along_axis(z_btv, targets_bt[..., None], axis=-1)[..., 0]
    uniform_bt = lse_bt - jnp.mean(z_btv, axis=-1)
    label_bt = (1 - label_smoothing) * nll_bt + label_smoothing * uniform_bt
    loss_sum = jnp.sum(weights_bt * (label_bt + z_loss * lse_bt**2))
    return loss_sum, jax.lax.stop_gradient(jnp.sum(weights_bt * nll_bt))


def token_losses(
    x_btd: jax.Array, w_dv: jax.Array, targets_bt: jax.Array, *, softcap: float | None = None
) -> jax.Array:
    """nll_bt in float32."""
    z_btv = logits(x_btd, w_dv, softcap)
    picked_bt = jnp.take_along_axis(z_btv, targets_bt[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(z_btv, axis=-1) - picked_bt
