"""Log-probabilities of tokens equal those of full logits, values and gradients; sums over the
documents of packed rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from packed_pairs import CONFIG, documents, in_rows, init, pack

from lm import model
from lm.objectives.token_losses import by_pairs, sum_segments, token_logps


def test_log_probabilities_and_gradients_equal_those_of_full_logits():
    config = dataclasses.replace(CONFIG, logit_softcap=20.0)
    batch = pack(in_rows(documents(8), 4), 48)
    weights = np.random.default_rng(0).normal(size=batch.tokens.shape)  # of either sign

    def ours(apply, hidden):
        return token_logps(apply, hidden, batch.targets)

    def plain(apply, hidden):
        logp_btv = jax.nn.log_softmax(apply.logits(hidden))
        return jnp.take_along_axis(logp_btv, batch.targets[..., None], axis=-1)[..., 0]

    def of(function):
        def total(params):
            apply = model.Model(config, params)
            logp_bt = function(apply, apply(batch.tokens, segments_bt=batch.segments).hidden_btd)
            return jnp.sum(weights * logp_bt), logp_bt

        return jax.value_and_grad(total, has_aux=True)

    params = init(0, config)
    ((_, got), got_grads), ((_, want), want_grads) = jax.jit(lambda p: (of(ours)(p), of(plain)(p)))(
        params
    )
    # float32 logits of a few units, summed in another order.
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got_grads, want_grads
    )


def test_sums_over_documents():
    segments = jnp.array([[1, 1, 2, 3, 4, 4, 0], [1, 2, 2, 2, 0, 0, 0]])
    x_bt = jnp.arange(14.0).reshape(2, 7)
    sums_bs = sum_segments(x_bt, segments)
    np.testing.assert_array_equal(sums_bs[:, :4], [[1, 2, 3, 9], [7, 27, 0, 0]])
    first, second = by_pairs(sums_bs)
    np.testing.assert_array_equal(first, [[1, 3, 0], [7, 0, 0]])
    np.testing.assert_array_equal(second, [[2, 9, 0], [27, 0, 0]])
