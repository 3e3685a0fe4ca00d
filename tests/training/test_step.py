"""The training step: gradient accumulation, clipping, skipped updates, donation, expert balancing
and metrics."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from train_examples import DENSE, batch

from lm import model, objectives, optim, training, trees
from lm.errors import UserError
from lm.parallel.mesh import Mesh, Place
from lm.precision import Precision

SCHEDULE = optim.Linear(peak=0.1, warmup=2, steps=10)
MESH = Mesh().build()
SGD = optim.SGD()


def prepare(config=DENSE, optimizer=SGD, seed=0, **place):
    """Returns (initial state, compiled step)."""
    place = Place(**place)
    state, shardings = initial(config, optimizer, place.offload)
    return jax.device_put(state, shardings[0]), compiled(config, optimizer, seed, place)


@functools.cache
def initial(config, optimizer, offload):
    """(State on the host, its shardings)."""
    transformation = optimizer.build(SCHEDULE.at, model.axes(config))
    shardings = training.state_shardings(config, transformation, Precision(), MESH, offload=offload)
    state, _ = training.init_state(config, transformation, Precision(), 0, shardings)
    return host(state), shardings


@functools.cache
def compiled(config, optimizer, seed, place):
    _, shardings = initial(config, optimizer, place.offload)
    step = training.make_step(
        *(config, objectives.NextToken(), optimizer, SCHEDULE.at, Precision()),
        place=place,
        seed=seed,
    )
    return training.compile_step(step, shardings, MESH)


def host(tree):
    """A copy that donation cannot delete."""
    return jax.tree.map(np.array, tree)


def test_gradient_accumulation_gives_the_gradient_of_the_whole_batch():
    """The label weights are so uneven that a mean of the microbatch means would be far off."""
    data = batch()
    data = data._replace(weights=data.weights * np.array([[1], [0], [0.1], [5]], np.float32))
    results = {}
    for microbatches in (1, 2, 4):
        state, step = prepare(microbatches=microbatches)
        before = host(state.params)
        state, metrics = step(state, data, {})
        rate = float(metrics["learning_rate"])
        # With plain SGD, the change divided by the rate is the gradient.
        grads = jax.tree.map(lambda a, b: (a - np.array(b)) / rate, before, state.params)  # noqa: B023
        results[microbatches] = grads, metrics
    exact, line = results[1]
    size = trees.global_norm(exact)
    for grads, metrics in (results[2], results[4]):
        difference = trees.global_norm(jax.tree.map(lambda a, b: a - b, grads, exact))
        # float32 sums in a different order; for parameters of size 1, changes of 0.05 are exact to
        # 1e-6.
        assert difference < 5e-6 * size
        for name in line:
            assert metrics[name] == pytest.approx(float(line[name]), rel=1e-6), name


class Squares(model.FeedForwardConfig):
    """A user's feed-forward whose auxiliary loss is not linear in its statistics."""

    def build(self, dim, rngs, init=None):
        return _Squares(dim, rngs)

    def measures(self, sums):
        return {"square": 0.3 * jnp.square(sums["square"] / sums["count"])}, None


class _Squares(nnx.Module):
    def __init__(self, dim, rngs):
        self.w = model.param(rngs, (dim, dim), ("embed", "mlp"), jax.nn.initializers.normal(0.3))

    def __call__(self, x_btd, mask_bt=None):
        y_btd = model.einsum("btd,df->btf", x_btd, self.w)
        mask_bt = mask_bt.astype(y_btd.dtype)
        squares = jnp.sum(mask_bt[..., None] * jnp.square(y_btd))
        return y_btd, {"square": squares, "count": mask_bt.sum()}


MOE = model.MoE(
    experts=4, experts_per_token=2, hidden=16, balance=model.LoadBalance(weight=0.5), z_loss=0.1
)


BY_SEQUENCE = dataclasses.replace(MOE, balance=model.LoadBalance(weight=0.5, over="sequence"))


@pytest.mark.parametrize(
    "ffn",
    [
        MOE,
        pytest.param(BY_SEQUENCE, marks=pytest.mark.slow),
        pytest.param(Squares(), marks=pytest.mark.slow),
    ],
    ids=["batch", "sequence", "own"],
)
def test_auxiliary_losses_do_not_depend_on_the_number_of_micro_batches(ffn):
    """Loss, gradient and metrics, although the micro-batches have different numbers of tokens and
    target weights, one of them none."""
    config = dataclasses.replace(DENSE, ffn=ffn)
    data = batch()
    segments = data.segments * (np.arange(8) < np.array([[8], [5], [2], [7]]))
    weights = data.weights * np.array([[1], [0], [0.1], [5]], np.float32) * (segments > 0)
    data, lines, changes = data._replace(segments=segments, weights=weights), {}, {}
    for microbatches in (1, 4):
        state, step = prepare(config, microbatches=microbatches)
        before = host(state.params)
        state, lines[microbatches] = step(state, data, {})
        changes[microbatches] = jax.tree.map(lambda a, b: np.array(a) - b, state.params, before)
    names = {"square"} if ffn == Squares() else {"balance", "router_z"}
    assert names <= lines[1].keys() and all(lines[1][name] > 0 for name in names)
    for name, value in lines[1].items():
        # float32 sums in a different order.
        assert lines[4][name] == pytest.approx(float(value), rel=2e-6), name
    difference = jax.tree.map(lambda a, b: a - b, changes[1], changes[4])
    assert trees.global_norm(difference) < 5e-6 * trees.global_norm(changes[1])


def test_gradients_may_be_accumulated_in_bfloat16():
    """Takes half the memory. The error is within bfloat16 rounding: 2^-9 of each of four partial
    sums."""
    data, results, programs = batch(), {}, {}
    for accumulate in ("float32", "bfloat16"):
        state, step = prepare(microbatches=4, accumulate=accumulate)
        programs[accumulate] = step.trace(state, data, {}).jaxpr
        before = host(state.params)
        state, metrics = step(state, data, {})
        rate = float(metrics["learning_rate"])
        results[accumulate] = jax.tree.map(
            lambda a, b: (a - np.array(b)) / rate,  # noqa: B023
            before,
            state.params,
        )
    exact = results["float32"]
    difference = jax.tree.map(lambda a, b: a - b, results["bfloat16"], exact)
    assert 0 < trees.global_norm(difference) < 2**-7 * trees.global_norm(exact)

    def summed(program):
        """Bytes carried by the loop over microbatches."""
        (loop,) = (
            eqn
            for eqn in program.eqns
            if eqn.primitive.name == "scan" and eqn.params["length"] == 4
        )
        return sum(x.aval.size * x.aval.dtype.itemsize for x in loop.outvars)

    # The sums of the loss, a few scalars, stay in float32.
    assert summed(programs["bfloat16"]) == pytest.approx(summed(programs["float32"]) / 2, rel=1e-2)


@pytest.mark.parametrize(
    "remat",
    ["none", *(pytest.param(r, marks=pytest.mark.slow) for r in ("dots", "block", ("qkv",)))],
    ids=str,
)
def test_offloading_to_host_memory_does_not_change_the_numbers(remat):
    """The optimizer state is in host memory, and after three updates the numbers agree to within
    rounding: the program is a different one, and XLA may sum in a different order."""
    adam = optim.AdamW()
    state, step = prepare(optimizer=adam, remat=remat)
    away, offloading = prepare(optimizer=adam, remat=remat, offload=("optimizer", "layers"))
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(away.opt_state) if x.ndim}
    assert kinds == {"pinned_host"}
    for _ in range(3):
        state, line = step(state, batch(), {})
        away, other = offloading(away, batch(), {})
        assert other["loss"] == pytest.approx(float(line["loss"]), rel=1e-6)
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(away.opt_state) if x.ndim}
    assert kinds == {"pinned_host"}
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(away), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_gradient_norm_is_reported_before_clipping_and_bounded_after_it():
    data, moved, norms = batch(), {}, {}
    for clip in (None, 0.05, 1e6):
        state, step = prepare(optimizer=optim.SGD(clip_norm=clip), microbatches=2)
        before = host(state.params)
        state, metrics = step(state, data, {})
        change = jax.tree.map(lambda a, b: a - np.array(b), before, state.params)
        moved[clip] = trees.global_norm(change) / metrics["learning_rate"]
        norms[clip] = metrics["grad_norm"]
    assert len(set(map(float, norms.values()))) == 1 and norms[None] > 0.1
    assert moved[None] == pytest.approx(float(norms[None]), rel=1e-3)
    assert moved[0.05] == pytest.approx(0.05, rel=1e-3)
    assert moved[1e6] == moved[None]


def test_nonfinite_batch_changes_only_the_counters():
    state, step = prepare(optimizer=optim.AdamW(weight_decay=0.1))
    state, _ = step(state, batch(), {})
    before = host(state)
    bad = batch(1)
    bad.weights[0, 0] = np.nan
    state, metrics = step(state, bad, {})
    assert metrics["skipped"] == 1 and state.skipped == 1 and state.step == 2
    for name in ("params", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(before, name), getattr(state, name))
    state, metrics = step(state, batch(2), {})
    assert metrics["skipped"] == 0 and state.skipped == 1 and state.step == 3
    assert metrics["learning_rate"] == SCHEDULE.at(2), "skipped updates count in the schedule"


def test_batch_with_zero_label_weights_has_zero_gradient():
    state, step = prepare()
    before = host(state.params)
    state, metrics = step(state, batch(weights=np.zeros((4, 8))), {})
    assert metrics["skipped"] == 0 and metrics["loss"] == 0 and metrics["grad_norm"] == 0
    jax.tree.map(np.testing.assert_array_equal, before, state.params)


def test_the_state_is_donated():
    state, step = prepare(optimizer=optim.AdamW(weight_decay=0.1))
    old = jax.tree.leaves((state.params, state.opt_state))
    step(state, batch(), {})
    assert all(leaf.is_deleted() for leaf in old)


def test_the_state_is_updated_in_place():
    """The compiled step copies no parameter and no moment; checked for the wide matrices."""
    config = dataclasses.replace(DENSE, vocab=997)
    state, step = prepare(config, optim.AdamW(weight_decay=0.1, clip_norm=1.0))
    text = step.lower(state, batch(), {}).compile().as_text()
    copies = [
        line for line in text.splitlines() if re.search(r" = f32\[(997,16|16,997)\].* copy\(", line)
    ]
    assert not copies


def test_step_reports_its_metrics():
    state, step = prepare(optimizer=optim.AdamW(clip_norm=1.0))
    data = batch()
    losses = []
    for i in range(20):
        state, metrics = step(state, data, {})
        assert all(x.dtype == jnp.float32 and x.shape == () for x in metrics.values())
        if i == 0:
            norm = float(trees.global_norm(state.params))
            assert metrics["param_norm"] == pytest.approx(norm)
            assert metrics["learning_rate"] == pytest.approx(0.05)
            assert metrics["tokens"] == 28, "padding is not counted"
            assert metrics["weight"] == pytest.approx(data.weights.sum())
            assert metrics["loss"] == metrics["nll"]
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0], "the loss falls when one batch is repeated"
    assert "loss_scale" not in metrics and state.loss_scale is None


def test_balancing_bias_is_updated_only_by_the_load():
    moe = model.MoE(experts=4, experts_per_token=2, hidden=8, balance=model.BiasBalance(rate=0.01))
    config = dataclasses.replace(DENSE, ffn=moe)
    one, step = prepare(config, optim.Muon(weight_decay=0.1), microbatches=1)
    two, step_two = prepare(config, optim.Muon(weight_decay=0.1), microbatches=2)
    one, _ = step(one, batch(), {})
    two, _ = step_two(two, batch(), {})
    bias = np.array(one.params["blocks"]["0"]["ffn"]["bias"])
    # Each expert's bias changed by one `rate` up or down, towards a uniform load.
    np.testing.assert_allclose(np.abs(bias[bias != 0]), 0.01, rtol=1e-5)
    assert (bias != 0).any()


def test_dropout_depends_on_seed_and_step():
    config = dataclasses.replace(DENSE, dropout=0.5)
    losses = []
    for seed in (0, 0, 1):
        state, step = prepare(config, optim.SGD(clip_norm=1e-9), seed=seed)
        for _ in range(2):
            state, metrics = step(state, batch(), {})
            losses.append(float(metrics["loss"]))
    assert losses[:2] == losses[2:4]
    assert len({losses[0], losses[1], losses[4], losses[5]}) == 4


@pytest.mark.slow
def test_program_size_does_not_depend_on_layers_or_microbatches():
    def lines(layers, microbatches):
        config = dataclasses.replace(DENSE, layers=layers)
        state, step = prepare(config, microbatches=microbatches)
        text = step.lower(state, batch(rows=8), {}).as_text()
        return len(re.findall(r"\n", text))

    assert lines(2, 2) == lines(4, 4)


def test_microbatches_must_divide_the_batch():
    state, step = prepare(microbatches=3)
    with pytest.raises(
        UserError, match=r"place\.microbatches=3 does not divide batch\.sequences=4"
    ):
        step(state, batch(), {})
