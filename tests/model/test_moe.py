"""A mixture of experts equals the explicit sum over all experts, and its routers follow their
papers. Shapes are tiny; float32 sums in two orders differ by about 1e-6 of the largest term."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lm.errors import UserError
from lm.model.initializers import He
from lm.model.moe import (
    BiasBalance,
    Capacity,
    Dropless,
    LoadBalance,
    MoE,
    Shared,
    SigmoidRouter,
    SoftmaxRouter,
    measures,
    route,
    router_logits,
    update_bias,
)

B, T, D, F, E, K = 3, 10, 8, 12, 6, 2
PLAIN = MoE(experts=E, experts_per_token=K, hidden=F, balance=None)
CLOSE = {"rtol": 1e-5, "atol": 2e-6}
X = jax.random.normal(jax.random.key(0), (B, T, D))
MASK = jnp.arange(T) < jnp.array([10, 7, 0])[:, None]


def build(config, seed=1):
    return config.build(D, nnx.Rngs(params=seed), He(gain=1.0).build(1))


def written_out(module, x_btd, mask_bt, logits_bte=None):
    """Reference: applies every expert to every token, with weight zero for experts not chosen."""
    config = module.config
    bias = None if module.bias is None else module.bias[...]
    routing = route(config, router_logits(x_btd, module.router[...]), bias, mask_bt)
    weights = (jax.nn.one_hot(routing.chosen_btk, E) * routing.weights_btk[..., None]).sum(2)
    gate = jax.nn.silu(jnp.einsum("btd,edf->btef", x_btd, module.gate[...]))
    h = gate * jnp.einsum("btd,edf->btef", x_btd, module.up[...])
    y = jnp.einsum("btef,efd,bte->btd", h, module.down[...], weights)
    if module.shared is not None:
        y += module.shared(x_btd)
    return y, routing.sums


def measured(config, logits_bte, bias_e, mask_bt):
    return measures(config, route(config, logits_bte, bias_e, mask_bt).sums)


@jax.jit
def values_and_gradients(module, x_btd, mask_bt):
    return _values_and_gradients(lambda module, *a: module(*a), module, x_btd, mask_bt)


@jax.jit
def values_and_gradients_written_out(module, x_btd, mask_bt):
    return _values_and_gradients(written_out, module, x_btd, mask_bt)


def _values_and_gradients(function, module, x_btd, mask_bt):
    def loss(module, x_btd):
        y, sums = function(module, x_btd, mask_bt)
        losses, load = measures(module.config, sums)
        return jnp.sin(y).sum() + sum(losses.values(), 0.0), (y, losses, load)

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(module, x_btd)


@jax.jit
def apply(module, x_btd, mask_bt=None):
    return module(x_btd, mask_bt)


def assert_close(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), got, want)


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(PLAIN, balance=LoadBalance(weight=0.5), z_loss=0.1),
        dataclasses.replace(PLAIN, router=SoftmaxRouter(renormalize=False), experts_per_token=1),
        dataclasses.replace(PLAIN, router=SigmoidRouter(scale=2.5), balance=BiasBalance()),
        dataclasses.replace(PLAIN, router=SigmoidRouter(renormalize=False), experts_per_token=E),
        dataclasses.replace(PLAIN, shared=Shared(hidden=5)),
        dataclasses.replace(PLAIN, shared=Shared(hidden=5, gated=True)),
    ],
    ids=["losses", "switch", "sigmoid", "all", "shared", "gated"],
)
def test_dropless_and_sufficient_capacity_match_the_sum_over_experts(config):
    want = values_and_gradients_written_out(build(config), X, MASK)
    assert_close(values_and_gradients(build(config), X, MASK)[0], want[0])
    for dispatch in (Dropless(), Capacity(factor=E)):
        module = build(dataclasses.replace(config, dispatch=dispatch))
        (value, aux), gradients = values_and_gradients(module, X, MASK)
        assert_close((value, aux), want[0])
        assert_close(jax.tree.leaves(gradients), jax.tree.leaves(want[1]))


def test_masked_tokens_are_not_routed_or_counted():
    module = build(dataclasses.replace(PLAIN, balance=LoadBalance(weight=1.0), z_loss=1.0))
    y, sums = apply(module, X, MASK)
    _, load = measures(module.config, sums)
    elsewhere = jnp.where(MASK[..., None], X, 100.0)
    assert_close(apply(module, elsewhere, MASK), (y, sums))
    np.testing.assert_array_equal(y[~MASK], 0)
    np.testing.assert_allclose(load.sum(), 1, rtol=1e-6)
    alone = apply(module, X[:1])
    assert_close(apply(module, X[:1], MASK[:1]), alone)
    nothing = apply(module, X, jnp.zeros_like(MASK))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(nothing))


def test_masked_tokens_use_no_capacity():
    config = dataclasses.replace(PLAIN, dispatch=Capacity(factor=0.5))
    mask = jnp.arange(T)[None] >= 4
    short = dataclasses.replace(config, dispatch=Capacity(factor=0.5 * T / (T - 4)))
    masked = apply(build(config), X[:1], mask)[0]
    np.testing.assert_allclose(masked[:, 4:], apply(build(short), X[:1, 4:])[0], **CLOSE)


def test_capacity_drops_the_last_tokens_of_each_sequence():
    """All tokens choose experts 0 and 1, each of which accepts 4 of the 10: factor * T * K / E."""
    config = dataclasses.replace(PLAIN, dispatch=Capacity(factor=1.2))
    assert config.dispatch.slots(T, K, E) == 4
    module = build(config)
    module.router[...] = jnp.zeros((D, E)).at[:, 0].set(2.0).at[:, 1].set(1.0)
    x = jnp.abs(X) + 0.1
    y = apply(module, x)[0]
    module.config = dataclasses.replace(config, dispatch=Dropless())
    np.testing.assert_allclose(y[:, :4], apply(module, x)[0][:, :4], **CLOSE)
    np.testing.assert_array_equal(y[:, 4:], 0)


def test_capacity_is_causal():
    """No output depends on a later token, although tokens compete for the same slots."""
    module = build(dataclasses.replace(PLAIN, dispatch=Capacity(factor=0.7)))
    other = X.at[:, 6:].set(jax.random.normal(jax.random.key(5), (B, T - 6, D)))
    np.testing.assert_array_equal(apply(module, X)[0][:, :6], apply(module, other)[0][:, :6])


LOGITS = 2 * jax.random.normal(jax.random.key(2), (B, T, E))
ALL = jnp.ones((B, T), bool)


def test_renormalized_weights_are_the_softmax_over_the_chosen_experts():
    routing = route(PLAIN, LOGITS, None, ALL)
    chosen = jnp.take_along_axis(LOGITS, routing.chosen_btk, -1)
    np.testing.assert_allclose(routing.weights_btk, jax.nn.softmax(chosen), rtol=1e-5)


def test_weights_without_renormalization_are_the_softmax_probabilities():
    config = dataclasses.replace(PLAIN, router=SoftmaxRouter(renormalize=False))
    routing = route(config, LOGITS, None, ALL)
    want = np.sort(jax.nn.softmax(LOGITS))[..., : -K - 1 : -1]
    np.testing.assert_allclose(routing.weights_btk, want, rtol=1e-6)


def test_sigmoid_weights_sum_to_the_scale():
    config = dataclasses.replace(PLAIN, router=SigmoidRouter(scale=2.5))
    np.testing.assert_allclose(route(config, LOGITS, None, ALL).weights_btk.sum(-1), 2.5, rtol=1e-6)
    hopeless = route(config, jnp.full_like(LOGITS, -200.0), None, ALL)
    assert np.isfinite(hopeless.weights_btk).all()


def test_load_balancing_loss_equals_its_weight_for_uniform_load_and_grows_with_skew():
    config = dataclasses.replace(PLAIN, balance=LoadBalance(weight=0.3))

    def balance(logits_bte):
        mask_bt = jnp.ones(logits_bte.shape[:2], bool)
        return measured(config, logits_bte, None, mask_bt)[0]["balance"]

    even = 3 * jnp.stack([jnp.roll(jnp.eye(E)[0] + jnp.eye(E)[1], i) for i in range(E)])[None]
    np.testing.assert_allclose(balance(even), 0.3, rtol=1e-6)
    skewed = LOGITS + jnp.linspace(0, 2, E)
    value, gradient = jax.jit(jax.value_and_grad(balance))(skewed)
    assert value > 0.35
    assert balance(skewed - 3 * gradient) < value


def test_load_balancing_by_sequence_is_the_mean_of_the_rows_by_their_tokens():
    whole = dataclasses.replace(PLAIN, balance=LoadBalance(weight=0.3))
    rows = dataclasses.replace(PLAIN, balance=LoadBalance(weight=0.3, over="sequence"))
    logits = LOGITS + jnp.linspace(0, 2, E)
    each = [
        measured(whole, logits[b : b + 1], None, MASK[b : b + 1])[0]["balance"] for b in range(B)
    ]
    mean = np.average(each, weights=MASK.sum(1))
    by_row = measured(rows, logits, None, MASK)[0]["balance"]
    np.testing.assert_allclose(by_row, mean, rtol=1e-6)
    assert by_row != measured(whole, logits, None, MASK)[0]["balance"]


def test_z_loss_is_the_mean_squared_logsumexp():
    config = dataclasses.replace(PLAIN, z_loss=0.01)
    z = np.log(np.exp(np.asarray(LOGITS, np.float64)).sum(-1))
    got = measured(config, LOGITS, None, MASK)[0]["router_z"]
    np.testing.assert_allclose(got, 0.01 * np.mean(z[np.asarray(MASK)] ** 2), rtol=1e-5)


@pytest.mark.parametrize("router", [SoftmaxRouter(), SigmoidRouter(renormalize=False)])
def test_balancing_bias_changes_the_chosen_experts_but_not_their_weights(router):
    config = dataclasses.replace(PLAIN, router=router, balance=BiasBalance())
    routing = route(config, LOGITS, jnp.zeros(E).at[3].set(9.0), ALL)
    assert (routing.chosen_btk[..., 0] == 3).all()
    scores = jnp.take_along_axis(router.scores(LOGITS), routing.chosen_btk, -1)
    np.testing.assert_allclose(routing.weights_btk, router.weights(scores), rtol=1e-6)


def test_balancing_bias_gets_no_gradient():
    module = build(dataclasses.replace(PLAIN, balance=BiasBalance()))
    _, (gradients, _) = values_and_gradients(module, X, MASK)
    np.testing.assert_array_equal(gradients.bias[...], 0)
    assert np.abs(gradients.router[...]).max() > 0


def test_bias_updates_balance_a_skewed_router():
    config = dataclasses.replace(PLAIN, router=SigmoidRouter(), balance=BiasBalance())
    logits = jax.random.normal(jax.random.key(3), (8, 32, E)) + jnp.linspace(0, 3, E)
    step = jax.jit(lambda bias: measured(config, logits, bias, jnp.ones(logits.shape[:2], bool))[1])
    bias = jnp.zeros(E)
    first = load = step(bias)
    assert first.max() > 0.3
    raised = update_bias(bias, load, 0.01)
    np.testing.assert_allclose(raised, np.where(load < 1 / E, 0.01, -0.01), rtol=1e-6)
    for _ in range(100):
        bias = update_bias(bias, load, 0.01)
        load = step(bias)
    # The remaining imbalance is within the effect of one bias update.
    assert np.abs(load - 1 / E).max() < 0.05 < np.abs(first - 1 / E).max()


def test_bias_update_of_stacked_layers_matches_each_layer():
    bias, load = jax.random.normal(jax.random.key(4), (2, 3, E))
    load = jax.nn.softmax(load)
    each = jnp.stack([update_bias(b, s, 0.1) for b, s in zip(bias, load, strict=True)])
    np.testing.assert_array_equal(update_bias(bias, load, 0.1), each)


def test_checkpointed_scan_over_stacked_layers_matches_unrolled_layers():
    config = dataclasses.replace(PLAIN, balance=LoadBalance(), dispatch=Dropless())
    keys = jax.random.split(jax.random.key(6), 2)
    stacked = jax.vmap(lambda key: build(config, key))(keys)

    @jax.jit
    def scanned(stacked, x_btd):
        @jax.checkpoint
        def layer(x_btd, module):
            y_btd, sums = module(x_btd, MASK)
            losses, load_e = measures(module.config, sums)
            return x_btd + y_btd, (losses["balance"], load_e)

        x_btd, (balance, load_le) = jax.lax.scan(layer, x_btd, stacked)
        return jnp.sin(x_btd).sum() + balance.sum(), load_le

    @jax.jit
    def unrolled(stacked, x_btd):
        total = 0.0
        for module in (jax.tree.map(lambda w, i=i: w[i], stacked) for i in range(2)):
            y_btd, sums = written_out(module, x_btd, MASK)
            losses, _ = measures(module.config, sums)
            x_btd, total = x_btd + y_btd, total + losses["balance"]
        return jnp.sin(x_btd).sum() + total

    (got, load_le), gradients = jax.value_and_grad(scanned, has_aux=True)(stacked, X)
    want, want_gradients = jax.value_and_grad(unrolled)(stacked, X)
    assert load_le.shape == (2, E)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    # Two layers amplify the rounding error of one.
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(want_gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_routing_uses_float32_with_bfloat16_weights():
    module = build(dataclasses.replace(PLAIN, z_loss=0.1))
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), module)
    y, sums = apply(half, X.astype(jnp.bfloat16))
    losses, load = measures(half.config, sums)
    assert y.dtype == jnp.bfloat16
    assert losses["router_z"].dtype == load.dtype == jnp.float32
    logits = router_logits(X.astype(jnp.bfloat16), half.router[...])
    assert logits.dtype == jnp.float32


@pytest.mark.parametrize(
    ("build_bad", "words"),
    [
        (lambda: MoE(experts=4, experts_per_token=5, hidden=8), "model.ffn.experts_per_token=5"),
        (lambda: MoE(experts=0, experts_per_token=1, hidden=8), "model.ffn.experts=0"),
        (lambda: MoE(experts=4, experts_per_token=2, hidden=-1), "model.ffn.hidden=-1"),
        (lambda: MoE(experts=4, experts_per_token=2, hidden=8, activation="sliu"), "'silu'"),
        (
            lambda: MoE(experts=4, experts_per_token=2, hidden=8, z_loss=-1.0),
            "model.ffn.z_loss=-1.0",
        ),
        (
            lambda: MoE(experts=4, experts_per_token=1, hidden=8),
            "model.ffn.router.renormalize=True",
        ),
        (lambda: Capacity(factor=0.0), "model.ffn.dispatch.factor=0.0"),
        (lambda: LoadBalance(weight=0.0), "model.ffn.balance.weight=0.0"),
        (lambda: LoadBalance(over="rows"), "model.ffn.balance.over='rows'"),
        (lambda: BiasBalance(rate=-1.0), "model.ffn.balance.rate=-1.0"),
        (lambda: SigmoidRouter(scale=0.0), "model.ffn.router.scale=0.0"),
        (lambda: Shared(hidden=0), "model.ffn.shared.hidden=0"),
    ],
)
def test_errors_for_invalid_configs_name_the_field(build_bad, words):
    with pytest.raises(UserError, match=words.replace(".", r"\.")):
        build_bad()
