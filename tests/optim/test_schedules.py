"""Learning rate schedules: values, continuity, durations in steps, fractions and tokens, and a
user-defined schedule of an experiment file."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import optim
from lm.errors import UserError

ALL = [
    optim.Constant(peak=0.5, warmup=10, steps=100),
    optim.WarmupCosine(peak=0.5, warmup=10, steps=100),
    optim.Linear(peak=0.5, warmup=10, steps=100),
    optim.Polynomial(peak=0.5, warmup=10, steps=100, power=2.0),
    optim.OneCycle(peak=0.5, warmup=10, steps=100),
    optim.WSD(peak=0.5, warmup=10, decay=20, steps=100),
    optim.WSD(peak=0.5, warmup=10, decay=20, steps=100, shape="1-sqrt", final=0.1),
    optim.InverseSqrt(peak=0.5, warmup=10, steps=100),
]
each = pytest.mark.parametrize("schedule", ALL, ids=lambda s: type(s).__name__)


class Batches:
    """Stands in for data.BatchShape: 100 tokens per step, 200 from step 10 on."""

    def tokens_before(self, step):
        return 100 * min(step, 10) + 200 * max(step - 10, 0)

    def steps_for(self, tokens):
        return int(np.ceil(tokens / 100 if tokens <= 1000 else 10 + (tokens - 1000) / 200))


def rates(schedule, steps=None):
    return np.asarray(jax.vmap(schedule.at)(jnp.arange(steps or schedule.steps + 1)))


@each
def test_rate_is_positive_continuous_and_highest_after_the_warmup(schedule):
    rate = rates(schedule)
    assert rate.dtype == np.float32
    assert (rate[:-1] > 0).all(), "no update, including the first, has learning rate zero"
    assert np.abs(np.diff(rate[:-1])).max() < 0.5 * 0.25
    assert rate.max() == pytest.approx(0.5) and rate[9:11].max() == pytest.approx(0.5)
    assert (np.diff(rate[:10]) > 0).all() and (np.diff(rate[10:]) <= 0).all()


@each
def test_schedule_can_be_traced_and_keeps_its_last_value(schedule):
    assert jax.jit(schedule.at)(jnp.int32(50)) == pytest.approx(float(schedule.at(50)))
    if not isinstance(schedule, optim.InverseSqrt):
        np.testing.assert_array_equal(rates(schedule, 120)[100:], schedule.at(100))


@each
def test_without_warmup_the_first_update_uses_the_peak_rate(schedule):
    assert dataclasses.replace(schedule, warmup=0).at(0) == pytest.approx(0.5)


@each
def test_schedule_supports_short_runs(schedule):
    for steps in (1, 2, 3, 7):
        parts = {"decay": 0.2} if isinstance(schedule, optim.WSD) else {}
        short = dataclasses.replace(schedule, steps=steps, warmup=0.1, **parts)
        assert np.isfinite(rates(short)).all() and (rates(short, steps) > 0).all()


def test_schedule_values_at_selected_steps():
    def at(kind, step, **options):
        return float(kind(peak=1.0, warmup=10, steps=110, **options).at(step))

    assert at(optim.Constant, 0) == pytest.approx(0.1)
    assert at(optim.Constant, 9) == pytest.approx(1.0)
    assert at(optim.WarmupCosine, 60, final=0.2) == pytest.approx(0.6)
    assert at(optim.WarmupCosine, 110, final=0.2) == pytest.approx(0.2)
    assert at(optim.Linear, 85) == pytest.approx(0.25)
    assert at(optim.Polynomial, 60, power=2.0) == pytest.approx(0.25)
    assert at(optim.OneCycle, 0, start=0.04) == pytest.approx(0.04)
    assert at(optim.OneCycle, 10) == pytest.approx(1.0)
    assert at(optim.OneCycle, 110, final=0.01) == pytest.approx(0.01)
    assert at(optim.WSD, 90, decay=20) == pytest.approx(1.0)
    assert at(optim.WSD, 95, decay=20) == pytest.approx(0.75)
    assert at(optim.WSD, 95, decay=20, shape="1-sqrt") == pytest.approx(0.5)
    assert at(optim.WSD, 109, decay=0) == pytest.approx(1.0)
    assert at(optim.InverseSqrt, 39) == pytest.approx(0.5)


def test_fractional_durations_scale_with_the_number_of_steps():
    schedule = optim.WSD(peak=1.0, warmup=0.02, decay=0.2, steps=1000)
    assert schedule.resolve() == optim.WSD(peak=1.0, warmup=20, decay=200, steps=1000)
    short = dataclasses.replace(schedule, steps=50)
    assert short.resolve() == optim.WSD(peak=1.0, warmup=1, decay=10, steps=50)
    assert short.at(45) == pytest.approx(0.5)
    hundred = optim.Linear(peak=1.0, warmup=0.29, steps=100).resolve()
    assert hundred.warmup == 29, "0.29 * 100 is 28.999999999999996"


def test_durations_in_tokens_convert_to_steps_of_a_growing_batch():
    schedule = optim.WSD(
        peak=1.0,
        warmup=optim.Tokens(500),
        decay=optim.Tokens(400),
        steps=optim.Tokens(3000),
    )
    resolved = schedule.resolve(Batches())
    assert resolved == optim.WSD(peak=1.0, warmup=5, decay=2, steps=20)
    assert resolved.resolve() == resolved
    mixed = optim.WarmupCosine(peak=1.0, warmup=0.25, steps=optim.Tokens(3000))
    assert mixed.resolve(Batches()).warmup == 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optim.Constant(peak=0.0, steps=1), r"schedule\.peak=0\.0 must be above zero"),
        (lambda: optim.Constant(peak=1.0, steps=0), r"schedule\.steps=0 must be above zero"),
        (lambda: optim.Constant(peak=1.0, steps=1.5), r"schedule\.steps=1\.5"),
        (lambda: optim.Linear(peak=1.0, steps=10, warmup=-1), r"schedule\.warmup=-1"),
        (lambda: optim.Linear(peak=1.0, steps=10, warmup=2.5), r"schedule\.warmup=2\.5"),
        (
            lambda: optim.WSD(peak=1.0, steps=50, warmup=40, decay=0.5),
            r"schedule\.warmup=40 \+ schedule\.decay=0\.5 comes to 65 steps, .*schedule\.steps=50",
        ),
        (
            lambda: optim.WSD(peak=1.0, steps=50, decay=1, shape="sqrt"),
            r"schedule\.shape='sqrt'.*'1-sqrt'",
        ),
        (lambda: optim.WarmupCosine(peak=1.0, steps=5, final=2.0), r"schedule\.final=2\.0"),
        (lambda: optim.Polynomial(peak=1.0, steps=5, power=0.0), r"schedule\.power=0\.0"),
        (lambda: optim.Tokens(0), r"Tokens\.count=0"),
        (
            lambda: optim.Linear(
                peak=1.0, steps=optim.Tokens(300), warmup=optim.Tokens(500)
            ).resolve(Batches()),
            r"comes to 5 steps, more than schedule\.steps=3",
        ),
    ],
)
def test_errors_for_invalid_fields_name_the_field(make, message):
    with pytest.raises(UserError, match=message):
        make()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Halving(optim.Schedule):
    """A schedule with an additional phase: after `hold`, the rate halves every `every` steps."""

    hold: int | float | optim.Tokens
    every: int

    phases = ("warmup", "hold")

    def rise(self, t, warmup):
        return jnp.sqrt((t + 1) / warmup)

    def after(self, t, lengths):
        since = jnp.maximum(t - lengths["warmup"] - lengths["hold"], 0)
        return 0.5 ** jnp.floor(since / self.every)


def test_user_defined_schedule():
    schedule = Halving(peak=1.0, warmup=4, hold=0.2, every=10, steps=50)
    found = [float(schedule.at(step)) for step in (0, 3, 13, 23, 24, 34)]
    assert found == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.5, 0.25])
    assert schedule.resolve() == dataclasses.replace(schedule, hold=10)
    resolved = dataclasses.replace(schedule, hold=optim.Tokens(500)).resolve(Batches())
    assert resolved == dataclasses.replace(schedule, hold=5)
    with pytest.raises(
        UserError, match=r"schedule\.warmup=4 \+ schedule\.hold=47 comes to 51 steps"
    ):
        dataclasses.replace(schedule, hold=47)
    with pytest.raises(TypeError, match="abstract"):
        optim.Schedule(peak=1.0, steps=1)
