"""The chunked loss matches the plain loss over [B, T, V], with label weights and z-loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_examples import DENSE, VOCAB, batch

from lm import model, objectives
from lm.errors import UserError

MOE = dataclasses.replace(
    DENSE,
    ffn=model.MoE(experts=4, experts_per_token=2, hidden=16, balance=model.LoadBalance(weight=0.1)),
)


def plain(config, params, data, z_loss):
    """Reference computed from all logits at once: (total, nll)."""
    output = model.Model(config, params)(
        data.tokens, segments_bt=data.segments, positions_bt=data.positions
    )
    logits_btv = model.Model(config, params).logits(output.hidden_btd)
    lse = jax.nn.logsumexp(logits_btv, axis=-1)
    nll = lse - jnp.take_along_axis(logits_btv, data.targets[..., None], axis=-1)[..., 0]
    return jnp.sum(data.weights * (nll + z_loss * lse**2)), jnp.sum(data.weights * nll)


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
def test_chunked_loss_and_gradients_match_the_plain_computation(config):
    params, data = jax.jit(model.init, static_argnums=0)(config, jax.random.key(0)), batch()
    objective = objectives.NextToken(z_loss=0.01, chunk=3, vocab_chunk=20)

    @jax.jit
    def both(params):
        def chunked(p):
            loss = objective.loss(model.Model(config, p), data, None, {})
            return loss.total, loss

        return (
            jax.value_and_grad(chunked, has_aux=True)(params),
            jax.value_and_grad(lambda p: plain(config, p, data, 0.01), has_aux=True)(params),
        )

    ((total, loss), grads), ((want, nll), want_grads) = both(params)
    # float32 sums in a different order.
    assert total == pytest.approx(float(want), rel=1e-5)
    assert loss.metrics["nll"] == pytest.approx(float(nll), rel=1e-5)
    assert loss.weight == pytest.approx(data.weights.sum())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, want_grads
    )
    if config is MOE:
        assert loss.metrics["nll"] < total, "the z-loss is only in the total"
        assert loss.statistics["blocks/0/ffn"].choices_e.shape == (2, 4)


def test_targets_with_zero_weight_do_not_affect_the_loss():
    params = jax.jit(model.init, static_argnums=0)(DENSE, jax.random.key(0))
    one = batch(weights=np.eye(4, 8))
    other = one._replace(targets=np.where(one.weights > 0, one.targets, 0))
    loss = jax.jit(
        lambda p, data: objectives.NextToken().loss(model.Model(DENSE, p), data, None, {}).total
    )
    assert loss(params, one) == loss(params, other)
    assert loss(params, one._replace(weights=2 * one.weights)) == 2 * loss(params, one)


def test_compiled_gradient_does_not_materialize_all_logits():
    """The compiled gradient contains neither [B, T, V] nor [B * T, V]; with a single chunk it
    would."""
    data = batch(rows=3, length=16)

    def compiled(chunk):
        def total(params):
            return (
                objectives.NextToken(chunk=chunk)
                .loss(model.Model(DENSE, params), data, None, {})
                .total
            )

        return jax.jit(jax.grad(total)).lower(model.shapes(DENSE)).compile().as_text()

    # Chunks of two positions have shape [3, 2, 61]; layouts may put the vocabulary axis anywhere.
    shapes = [f"[3,16,{VOCAB}]", f"[48,{VOCAB}]", f"[{VOCAB},48]", f"[8,3,2,{VOCAB}]"]
    assert not any(shape in compiled(2) for shape in shapes)
    assert any(shape in compiled(16) for shape in shapes)


def test_errors_for_invalid_fields_name_the_field():
    with pytest.raises(UserError, match=r"objective\.z_loss=-1"):
        objectives.NextToken(z_loss=-1)
    with pytest.raises(UserError, match=r"objective\.chunk=0"):
        objectives.NextToken(chunk=0)
    with pytest.raises(UserError, match=r"objective\.vocab_chunk=-2"):
        objectives.NextToken(vocab_chunk=-2)
