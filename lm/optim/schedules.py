"""Learning rate as a function of the step. A schedule declares; `resolve` turns its durations into
steps; `at(step)` is traced by jit.

Durations are whole steps, `Tokens(1e9)`, or a share of all steps as a number below one, which keeps
its meaning when `steps` is overridden. Step 0 is the first update: with a warm-up of W steps,
at(0) = peak / W (never zero) and at(W - 1) = peak. What falls afterwards would reach its final
value at step `steps`, one past the last update, so no update is spent at rate zero.
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
    """A duration in tokens, padding included, counted as the batches count them."""

    count: float

    def __post_init__(self) -> None:
        check_positive(**{"Tokens.count": self.count})


Duration = int | float | Tokens


@dataclass(frozen=True, kw_only=True)
class _Base(abc.ABC):
    """`peak` is the highest rate, `steps` the length of the run, `warmup` the linear rise from peak
    / warmup to peak."""

    peak: float
    steps: int | Tokens
    warmup: Duration = 0

    # The parts of the run, in words of the declaration; together they may not exceed `steps`.
    _parts: ClassVar[tuple[str, ...]] = ("warmup",)

    def __post_init__(self) -> None:
        check_positive(**{"schedule.peak": self.peak})
        if not isinstance(self.steps, Tokens):
            check_positive(**{"schedule.steps": self.steps})
            if self.steps != int(self.steps):
                raise UserError(
                    f"schedule.steps={self.steps!r} must be a whole number or Tokens(...)."
                )
        for name in self._parts:
            _check_duration(f"schedule.{name}", getattr(self, name))
        for name in ("final", "start"):
            if not 0 <= getattr(self, name, 0) <= 1:
                raise UserError(
                    f"schedule.{name}={getattr(self, name)!r} is a share of the peak: "
                    "between 0 and 1."
                )
        if not any(isinstance(getattr(self, name), Tokens) for name in ("steps", *self._parts)):
            self._check_fit(self._in_steps())

    def _check_fit(self, lengths: dict[str, int]) -> None:
        total = sum(lengths[name] for name in self._parts)
        if total > lengths["steps"]:
            parts = " + ".join(f"schedule.{name}={getattr(self, name)!r}" for name in self._parts)
            raise UserError(
                f"{parts} comes to {total} steps, more than schedule.steps={lengths['steps']}. "
                "Shorten it, or write it as a share of the steps, as in 0.1."
            )

    def _in_steps(self, batch: Any = None) -> dict[str, int]:
        if isinstance(self.steps, Tokens):
            steps = max(1, batch.steps_for(self.steps.count))
        else:
            steps = int(self.steps)
        lengths = {"steps": steps}
        for name in self._parts:
            value = getattr(self, name)
            if isinstance(value, Tokens) and name == "decay":
                # Batches may grow, so the last tokens are counted from the end.
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

    def resolve(self, batch: Any = None) -> Self:
        """The same schedule with every duration in whole steps.

        `batch` turns tokens into steps: `batch.steps_for(tokens)` and `batch.tokens_before(step)`,
        as data.BatchShape has them; it may be None where no duration is in Tokens. Raises UserError
        when the parts are longer than the run.
        """
        lengths = self._in_steps(batch)
        self._check_fit(lengths)
        return dataclasses.replace(self, **lengths)

    def at(self, step: jax.typing.ArrayLike) -> jax.Array:
        """The learning rate of update `step` (from 0), float32 scalar. Durations in Tokens must
        have been resolved."""
        lengths = self._in_steps()
        t, warmup = jnp.asarray(step, jnp.float32), lengths["warmup"]
        share = jnp.where(t < warmup, self._rise(t, max(warmup, 1)), self._after(t, lengths))
        return jnp.float32(self.peak) * share

    def _rise(self, t: jax.Array, warmup: int) -> jax.Array:
        """The share of the peak at step t of the warm-up."""
        return (t + 1) / warmup

    @abc.abstractmethod
    def _after(self, t: jax.Array, lengths: dict[str, int]) -> jax.Array:
        """The share of the peak at step t, when the warm-up is over."""


@dataclass(frozen=True, kw_only=True)
class Constant(_Base):
    """The peak throughout, after the warm-up."""

    def _after(self, t: jax.Array, lengths: dict[str, int]) -> jax.Array:
        return jnp.ones_like(t)


@dataclass(frozen=True, kw_only=True)
class WarmupCosine(_Base):
    """Half a cosine from the peak to final * peak (Loshchilov & Hutter, arXiv:1608.03983)."""

    final: float = 0.1

    def _after(self, t: jax.Array, lengths: dict[str, int]) -> jax.Array:
        return _between(_cosine(_progress(t, lengths)), self.final)


@dataclass(frozen=True, kw_only=True)
class Linear(_Base):
    """A straight line from the peak to final * peak."""

    final: float = 0.0

    def _after(self, t: jax.Array, lengths: dict[str, int]) -> jax.Array:
        return _between(1 - _progress(t, lengths), self.final)


@dataclass(frozen=True, kw_only=True)
class Polynomial(_Base):
    """(1 - progress) ** power, from the peak to final * peak."""

    power: float
    final: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(**{"schedule.power": self.power})

    def _after(self, t: jax.Array, lengths: dict[str, int]) -> jax.Array:
        return _between((1 - _progress(t, lengths)) ** self.power, self.final)


@dataclass(frozen=True, kw_only=True)
class OneCycle(_Base):
    """Half a cosine up from start * peak during the warm-up, half a cosine down to final * peak
    (Smith & Topin, arXiv:1708.07120).

    Unlike the others its rise begins at start * peak, and its peak is at step `warmup`.
    """

    warmup: Duration = 0.3
    start: float = 0.04
    final: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(**{"schedule.start": self.start})

    def _rise(self, t: jax.Array, warmup: int) -> jax.Array:
        return _between(_cosine(1 - jnp.minimum(t / warmup, 1)), self.start)

    def _after(self, t: jax.Array, lengths: dict[str, int]) -> jax.Array:
        return _between(_cosine(_progress(t, lengths)), self.final)


@dataclass(frozen=True, kw_only=True)
class WSD(_Base):
    """Warm-up, stable, decay (MiniCPM, arXiv:2404.06395): the peak until the last `decay` steps,
    which fall to final * peak.

    shape: 'linear', or '1-sqrt' for 1 - sqrt(progress) (Hägele et al., arXiv:2405.18392).
    """

    decay: Duration
    final: float = 0.0
    shape: str = "linear"

    _parts: ClassVar[tuple[str, ...]] = ("warmup", "decay")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name("schedule.shape", self.shape, ("linear", "1-sqrt"))

    def _after(self, t: jax.Array, lengths: dict[str, int]) -> jax.Array:
        decay = lengths["decay"]
        progress = jnp.clip((t - (lengths["steps"] - decay)) / max(decay, 1), 0, 1)
        share = 1 - (progress if self.shape == "linear" else jnp.sqrt(progress))
        # Without a decay the peak lasts to the end; 'progress' is then 1 only past it.
        return _between(share, self.final) if decay else jnp.ones_like(t)


@dataclass(frozen=True, kw_only=True)
class InverseSqrt(_Base):
    """peak * sqrt(warmup / step) after the warm-up, independent of the run's length (Vaswani et
    al., arXiv:1706.03762)."""

    def _after(self, t: jax.Array, lengths: dict[str, int]) -> jax.Array:
        return jax.lax.rsqrt((t + 1) / max(lengths["warmup"], 1))


Schedule = Constant | WarmupCosine | Linear | Polynomial | OneCycle | WSD | InverseSqrt


def _check_duration(name: str, value: Duration) -> None:
    if isinstance(value, Tokens):
        return
    if not (value >= 0 and (value < 1 or value == int(value))):
        raise UserError(
            f"{name}={value!r} must be a whole number of steps, Tokens(...), or a share of the "
            "steps below 1."
        )


def _progress(t: jax.Array, lengths: dict[str, int]) -> jax.Array:
    """From 0 at the end of the warm-up to 1 at `steps`, and 1 from there."""
    warmup = lengths["warmup"]
    return jnp.clip((t - warmup) / max(lengths["steps"] - warmup, 1), 0, 1)


def _cosine(progress: jax.Array) -> jax.Array:
    """1 to 0 along half a cosine."""
    return 0.5 * (1 + jnp.cos(jnp.pi * progress))


def _between(share: jax.Array, final: float) -> jax.Array:
    """1 -> 1, 0 -> final."""
    return final + (1 - final) * share
