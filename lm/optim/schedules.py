"""Learning-rate schedules: `resolve` turns durations into steps, `at(step)` is the learning rate
and can be traced.

A duration is a number of steps, `Tokens(1e9)`, or a fraction of all steps as a number below one,
which keeps its meaning when `steps` is overridden. Step 0 is the first update: with a warm-up of W
steps, at(0) = peak / W (never zero) and at(W - 1) = peak. A decay reaches its final value at step
`steps`, one past the last update, so that no update has learning rate zero.
"""

import abc
import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from lm.errors import UserError, check_name, check_positive


@dataclass(frozen=True)
class Tokens:
    """A duration in tokens, padding included, as the batches count them."""

    count: float

    def __post_init__(self) -> None:
        check_positive(**{"Tokens.count": self.count})


Duration = int | float | Tokens


@dataclass(frozen=True, kw_only=True)
class Schedule(abc.ABC):
    """Base class of schedules. A subclass returns the fraction of the peak from `after`::

        @dataclass(frozen=True, kw_only=True)
        class Halving(optim.Schedule):
            every: int

            def after(self, t, lengths):
                return 0.5 ** jnp.floor((t - lengths["warmup"]) / self.every)

    Args:
      peak: the highest learning rate.
      steps: the length of the run.
      warmup: the linear rise from peak / warmup to peak.
    """

    peak: float
    steps: int | Tokens
    warmup: Duration = 0

    # The fields that are durations of phases of the run; together they may not exceed `steps`.
    phases: ClassVar[tuple[str, ...]] = ("warmup",)

    def __post_init__(self) -> None:
        check_positive(**{"schedule.peak": self.peak})
        if not isinstance(self.steps, Tokens):
            check_positive(**{"schedule.steps": self.steps})
            if self.steps != int(self.steps):
                raise UserError(
                    f"schedule.steps={self.steps!r} must be a whole number or Tokens(...)."
                )
        for name in self.phases:
            _check_duration(f"schedule.{name}", getattr(self, name))
        if not any(isinstance(getattr(self, name), Tokens) for name in ("steps", *self.phases)):
            self._check_fit(self._in_steps())

    def rise(self, t: jax.Array, warmup: int) -> jax.Array:
        """The fraction of the peak at step t of the warm-up (float32 scalar, from 0)."""
        return (t + 1) / warmup

    @abc.abstractmethod
    def after(self, t: jax.Array, lengths: dict[str, int]) -> jax.Array:
        """The fraction of the peak at step t (float32 scalar) after the warm-up.

        `lengths` holds 'steps' and each of `phases` in steps.
        """

    def at(self, step: jax.typing.ArrayLike) -> jax.Array:
        """The learning rate of update `step` (from 0), float32 scalar. Durations in Tokens must
        have been resolved."""
        lengths = self._in_steps()
        t, warmup = jnp.asarray(step, jnp.float32), lengths["warmup"]
        share = jnp.where(t < warmup, self.rise(t, max(warmup, 1)), self.after(t, lengths))
        return jnp.float32(self.peak) * share

    def resolve(self, batch: Any = None) -> Self:
        """The same schedule with every duration in steps.

        `batch` turns tokens into steps: `batch.steps_for(tokens)` and `batch.tokens_before(step)`,
        as in data.BatchShape; it may be None where no duration is in Tokens. Raises UserError when
        the phases are longer than the run.
        """
        lengths = self._in_steps(batch)
        self._check_fit(lengths)
        return dataclasses.replace(self, **lengths)

    def _check_fit(self, lengths: dict[str, int]) -> None:
        total = sum(lengths[name] for name in self.phases)
        if total > lengths["steps"]:
            phases = " + ".join(f"schedule.{name}={getattr(self, name)!r}" for name in self.phases)
            raise UserError(
                f"{phases} comes to {total} steps, more than schedule.steps={lengths['steps']}. "
                "Shorten it, or write it as a fraction of the steps, such as 0.1."
            )

    def _in_steps(self, batch: Any = None) -> dict[str, int]:
        if isinstance(self.steps, Tokens):
            steps = max(1, batch.steps_for(self.steps.count))
        else:
            steps = int(self.steps)
        lengths = {"steps": steps}
        for name in self.phases:
            value = getattr(self, name)
            if isinstance(value, Tokens) and name == "decay":
                # The batch size may ramp up, so count the last tokens from the end.
                before = batch.tokens_before(steps) - value.count
                lengths[name] = steps - (batch.steps_for(before) if before > 0 else 0)
            elif isinstance(value, Tokens):
                lengths[name] = batch.steps_for(value.count)
            elif value < 1:
                # 0.29 * 100 is 28.999999999999996.
                lengths[name] = math.floor(value * steps + 1e-6)
            else:
                lengths[name] = int(value)
        return lengths


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """The peak after the warm-up."""

    def after(self, t: jax.Array, lengths: dict[str, int]) -> jax.Array:
        return jnp.ones_like(t)


@dataclass(frozen=True, kw_only=True)
class WarmupCosine(Schedule):
    """Half a cosine from the peak to final * peak (Loshchilov & Hutter, arXiv:1608.03983)."""

    final: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_fraction("final", self.final)

    def after(self, t: jax.Array, lengths: dict[str, int]) -> jax.Array:
        return _between(_cosine(_progress(t, lengths)), self.final)


@dataclass(frozen=True, kw_only=True)
class Linear(Schedule):
    """A straight line from the peak to final * peak."""

    final: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_fraction("final", self.final)

    def after(self, t: jax.Array, lengths: dict[str, int]) -> jax.Array:
        return _between(1 - _progress(t, lengths), self.final)


@dataclass(frozen=True, kw_only=True)
class Polynomial(Schedule):
    """(1 - progress) ** power, from the peak to final * peak."""

    power: float
    final: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_fraction("final", self.final)
        check_positive(**{"schedule.power": self.power})

    def after(self, t: jax.Array, lengths: dict[str, int]) -> jax.Array:
        return _between((1 - _progress(t, lengths)) ** self.power, self.final)


@dataclass(frozen=True, kw_only=True)
class OneCycle(Schedule):
    """Half a cosine up from start * peak during the warm-up, half a cosine down to final * peak
    (Smith & Topin, arXiv:1708.07120).

    Unlike the other schedules, it begins at start * peak and reaches the peak at step `warmup`.
    """

    warmup: Duration = 0.3
    start: float = 0.04
    final: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_fraction("final", self.final)
        _check_fraction("start", self.start)
        check_positive(**{"schedule.start": self.start})

    def rise(self, t: jax.Array, warmup: int) -> jax.Array:
        return _between(_cosine(1 - jnp.minimum(t / warmup, 1)), self.start)

    def after(self, t: jax.Array, lengths: dict[str, int]) -> jax.Array:
        return _between(_cosine(_progress(t, lengths)), self.final)


@dataclass(frozen=True, kw_only=True)
class WSD(Schedule):
    """Warm-up, stable, decay (MiniCPM, arXiv:2404.06395): the peak until the last `decay` steps,
    which decay to final * peak.

    `shape` of the decay is 'linear', or '1-sqrt' for 1 - sqrt(progress) (Hägele et al.,
    arXiv:2405.18392).
    """

    decay: Duration
    final: float = 0.0
    shape: str = "linear"

    phases: ClassVar[tuple[str, ...]] = ("warmup", "decay")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_fraction("final", self.final)
        check_name("schedule.shape", self.shape, ("linear", "1-sqrt"))

    def after(self, t: jax.Array, lengths: dict[str, int]) -> jax.Array:
        decay = lengths["decay"]
        progress = jnp.clip((t - (lengths["steps"] - decay)) / max(decay, 1), 0, 1)
        share = 1 - (progress if self.shape == "linear" else jnp.sqrt(progress))
        # Without a decay the peak lasts to the end.
        return _between(share, self.final) if decay else jnp.ones_like(t)


@dataclass(frozen=True, kw_only=True)
class InverseSqrt(Schedule):
    """peak * sqrt(warmup / step) after the warm-up, independent of the run's length (Vaswani et
    al., arXiv:1706.03762)."""

    def after(self, t: jax.Array, lengths: dict[str, int]) -> jax.Array:
        return jax.lax.rsqrt((t + 1) / max(lengths["warmup"], 1))


def _check_duration(name: str, value: Duration) -> None:
    if isinstance(value, Tokens):
        return
    if not (0 <= value < 1 or (1 <= value < math.inf and value == int(value))):
        raise UserError(
            f"{name}={value!r} must be a whole number of steps, Tokens(...), or a fraction of the "
            "steps below 1."
        )


def _check_fraction(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise UserError(
            f"schedule.{name}={value!r} is a fraction of the peak and must be between 0 and 1."
        )


def _progress(t: jax.Array, lengths: dict[str, int]) -> jax.Array:
    """0 at the end of the warm-up, 1 at `steps` and later."""
    warmup = lengths["warmup"]
    return jnp.clip((t - warmup) / max(lengths["steps"] - warmup, 1), 0, 1)


def _cosine(progress: jax.Array) -> jax.Array:
    """1 to 0 along half a cosine."""
    return 0.5 * (1 + jnp.cos(jnp.pi * progress))


def _between(share: jax.Array, final: float) -> jax.Array:
    """Maps 1 to 1 and 0 to final."""
    return final + (1 - final) * share
