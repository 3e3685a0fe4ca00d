"""Storage and compute dtypes, and loss scaling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_examples import DENSE, batch

from lm import model, objectives, optim, training
from lm.errors import UserError
from lm.parallel import hardware
from lm.parallel.mesh import Mesh
from lm.precision import BF16, FP16, LossScale, Precision

SCHEDULE = optim.Constant(peak=1e-2, steps=10)


def trained(precision, batches, objective=None):
    """Trains on the batches. Returns (host copies of the state before and after each step, metrics
    of each step)."""
    mesh = Mesh().build()
    optimizer = optim.AdamW(clip_norm=1.0)
    transformation = optimizer.build(SCHEDULE.at, model.axes(DENSE))
    shardings = training.state_shardings(DENSE, transformation, precision, mesh)
    state, _ = training.init_state(DENSE, transformation, precision, 0, shardings)
    step = training.make_step(DENSE, objectives.NextToken(), optimizer, SCHEDULE.at, precision)
    step = training.compile_step(step, shardings, mesh)
    states, lines = [jax.device_get(state)], []
    for data in batches:
        state, metrics = step(state, data, {})
        states.append(jax.device_get(state))
        lines.append({name: float(value) for name, value in metrics.items()})
    return states, lines


@pytest.mark.slow
def test_dtypes_of_params_and_optimizer_state_and_their_effect_on_the_loss():
    batches = [batch(seed) for seed in range(3)]
    _, exact_lines = trained(Precision(), batches)
    formats = [BF16, Precision(params="bfloat16", compute="bfloat16")]
    for precision in [*formats, FP16] if hardware.compiles("float16") else formats:
        states, lines = trained(precision, batches)
        stored = {leaf.dtype for leaf in jax.tree.leaves(states[-1].params)}
        assert stored == {jnp.dtype(precision.params)}
        moments = {leaf.dtype for leaf in jax.tree.leaves(states[-1].opt_state) if leaf.ndim}
        assert moments == {jnp.dtype("float32")}
        # bfloat16 has 8 significant bits: an error of 0.4 % per number, averaged over a batch.
        for ours, want in zip(lines, exact_lines, strict=True):
            assert ours["loss"] == pytest.approx(want["loss"], rel=5e-3)
            assert ours["grad_norm"] == pytest.approx(want["grad_norm"], rel=3e-2)


def test_overflow_skips_the_update_and_halves_the_loss_scale_which_later_grows():
    if not hardware.compiles("float16"):
        pytest.skip("XLA does not compile float16 for this processor")
    precision = Precision(
        compute="float16", loss_scale=LossScale(initial=2.0**24, growth_interval=2)
    )
    states, lines = trained(precision, [batch(seed) for seed in range(16)])
    skipped = [line["skipped"] for line in lines]
    scales = [line["loss_scale"] for line in lines]
    assert skipped[0] == 1 and skipped[-1] == 0
    finite_in_a_row = 0
    for i in range(15):
        finite_in_a_row = 0 if skipped[i] else finite_in_a_row + 1
        grows = finite_in_a_row == 2
        assert scales[i + 1] == scales[i] * (0.5 if skipped[i] else 2.0 if grows else 1.0)
        finite_in_a_row = 0 if grows else finite_in_a_row
        same = jax.tree.map(np.array_equal, states[i].params, states[i + 1].params)
        assert all(jax.tree.leaves(same)) == bool(skipped[i])
    assert states[-1].skipped == sum(skipped) and states[-1].step == 16


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Precision(compute="fp16"), r"precision\.compute='fp16'"),
        (lambda: Precision(params="float16"), r"precision\.params='float16'"),
        (lambda: Precision(compute="float16"), r"needs precision\.loss_scale"),
        (lambda: Precision(loss_scale=LossScale()), r"has no use with precision\.compute"),
        (lambda: LossScale(initial=0.0), r"precision\.loss_scale\.initial=0\.0"),
    ],
)
def test_errors_for_invalid_fields_name_the_field(make, message):
    with pytest.raises(UserError, match=message):
        make()
