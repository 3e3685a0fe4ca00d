"""Positional encodings: rotary embeddings (RoPE) and their scalings, ALiBi, or none.

RoPE rotates each pair (x[i], x[i + R/2]) of the first R entries of a head by position *
frequency[i], the half-split layout of Hugging Face's Llama. Frequencies follow the conventions of
Hugging Face's `rope_scaling`.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lm.errors import UserError, check_positive

_FIELD = "model.attention.position"


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Positions divided by `factor` (position interpolation, Chen et al., arXiv:2306.15595)."""

    factor: float

    def __post_init__(self) -> None:
        _check_factor(self.factor)

    def frequencies(self, theta: float, width: int) -> np.ndarray:
        return _frequencies(theta, width) / self.factor

    amplitude = 1.0


@dataclass(frozen=True, kw_only=True)
class NTK:
    """A larger base: the slowest pair rotates `factor` times slower, the fastest is unchanged
    (bloc97 2023; arXiv:2309.00071, section 3.1). Frequencies are the same at every length, as
    cached keys need."""

    factor: float

    def __post_init__(self) -> None:
        _check_factor(self.factor)

    def base(self, theta: float, width: int) -> float:
        """The larger base."""
        return theta * self.factor ** (width / (width - 2))

    def frequencies(self, theta: float, width: int) -> np.ndarray:
        return _frequencies(self.base(theta, width), width)

    amplitude = 1.0


@dataclass(frozen=True, kw_only=True)
class DynamicNTK:
    """No change within the `original` length; beyond it a base that grows with the length (emozilla
    2023; `rope_type: dynamic` in Hugging Face). Each token is rotated with the base of its own
    position, so a full forward pass equals decoding with a KV cache."""

    factor: float
    original: int

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        check_positive(**{f"{_FIELD}.scaling.original": self.original})

    def frequencies(self, theta: float, width: int) -> np.ndarray:
        return _frequencies(theta, width)

    def slowed(self, positions_bt11: jax.Array, width: int) -> jax.Array:
        """Factors on the frequencies at these positions, [B, T, 1, width/2]."""
        length = jnp.maximum(positions_bt11 + 1, self.original) / self.original
        growth = self.factor * length - (self.factor - 1)
        return growth ** (-jnp.arange(0, width, 2) / (width - 2))

    amplitude = 1.0


@dataclass(frozen=True, kw_only=True)
class YaRN:
    """Interpolates slow pairs by `factor`, keeps fast pairs, with a ramp between; scales queries
    and keys to keep the entropy of the softmax (Peng et al., arXiv:2309.00071).

    Args:
      factor: ratio of the new length to `original`.
      original: sequence length of training.
      beta_fast, beta_slow: rotations within `original` above which a pair is kept, and below which
        it is interpolated.
      attention_factor: factor on cosines and sines; None: 0.1 ln(factor) + 1.
      truncate: round the ends of the ramp to whole pairs, as the paper's code does.
    """

    factor: float
    original: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        check_positive(**{f"{_FIELD}.scaling.original": self.original})
        if self.attention_factor is not None:
            check_positive(**{f"{_FIELD}.scaling.attention_factor": self.attention_factor})
        if not math.inf > self.beta_fast > self.beta_slow > 0:
            raise UserError(
                f"{_FIELD}.scaling.beta_fast={self.beta_fast} must be above "
                f"beta_slow={self.beta_slow}, and both above zero."
            )

    def frequencies(self, theta: float, width: int) -> np.ndarray:
        low, high = (self._pair(turns, theta, width) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        ramp = np.clip((np.arange(width // 2) - low) / (max(high - low, 1e-3)), 0, 1)
        base = _frequencies(theta, width)
        return base * (1 - ramp) + base / self.factor * ramp

    def _pair(self, turns: float, theta: float, width: int) -> float:
        """Index, as a real number, of the pair with this many rotations within `original`."""
        return width * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    @property
    def amplitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Keeps pairs with more than `high` rotations within `original`, slows those with fewer than
    `low` by `factor`, blends between (Llama 3.1, arXiv:2407.21783; `high_freq_factor` and
    `low_freq_factor` in Hugging Face)."""

    factor: float
    original: int
    low: float = 1.0
    high: float = 4.0

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        check_positive(**{f"{_FIELD}.scaling.original": self.original})
        if not self.high > self.low > 0:
            raise UserError(
                f"{_FIELD}.scaling.high={self.high} must be above low={self.low}, "
                "and both above zero."
            )

    def frequencies(self, theta: float, width: int) -> np.ndarray:
        base = _frequencies(theta, width)
        turns = self.original * base / (2 * math.pi)
        kept = np.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return base * kept + base / self.factor * (1 - kept)

    amplitude = 1.0


def _check_factor(factor: float) -> None:
    if not 1 <= factor < math.inf:
        raise UserError(
            f"{_FIELD}.scaling.factor={factor!r} must be at least 1: "
            "how many times longer than in training."
        )


def _frequencies(theta: float, width: int) -> np.ndarray:
    """Radians per position of each pair, in float64."""
    return theta ** -(np.arange(0, width, 2) / width)


@dataclass(frozen=True, kw_only=True)
class RoPE:
    """Rotary position embedding (Su et al., arXiv:2104.09864).

    Args:
      theta: base of the geometric series of frequencies.
      scaling: extension beyond the sequence length of training.
      fraction: share of each head that is rotated, from its start (GPT-NeoX, arXiv:2204.06745).
    """

    theta: float = 10_000.0
    scaling: LinearScaling | NTK | DynamicNTK | YaRN | Llama3Scaling | None = None
    fraction: float = 1.0

    def __post_init__(self) -> None:
        if not 1 < self.theta < math.inf:
            raise UserError(
                f"{_FIELD}.theta={self.theta!r} must be above 1; the paper's is 10_000."
            )
        if not 0 < self.fraction <= 1:
            raise UserError(
                f"{_FIELD}.fraction={self.fraction!r} must be above 0 and at most 1; without any "
                "rotation, take position=NoPosition()."
            )

    def rotated(self, head_dim: int) -> int:
        """Number of rotated entries of a head."""
        return int(head_dim * self.fraction)

    def check(self, head_dim: int) -> None:
        """Raises UserError where a head of this width can't be split into pairs."""
        rotated = self.rotated(head_dim)
        if rotated % 2 or rotated < 4:
            raise UserError(
                f"model.attention.head_dim={head_dim} with position.fraction={self.fraction} "
                f"rotates {rotated} entries; RoPE needs an even number, 4 at least."
            )

    def table(self, positions_bt: jax.Array, head_dim: int) -> tuple[jax.Array, jax.Array]:
        """Cosines and sines [B, T, 1, R/2] in float32, where R is the number of rotated entries."""
        source = self.scaling.frequencies if self.scaling else _frequencies
        frequencies = jnp.asarray(source(self.theta, self.rotated(head_dim)), jnp.float32)
        if isinstance(self.scaling, DynamicNTK):
            positions_bt11 = positions_bt[:, :, None, None]
            frequencies *= self.scaling.slowed(positions_bt11, self.rotated(head_dim))
        angles = positions_bt[:, :, None, None].astype(jnp.float32) * frequencies
        amplitude = self.scaling.amplitude if self.scaling else 1.0
        return jnp.cos(angles) * amplitude, jnp.sin(angles) * amplitude


def rotate(x_btnh: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the first R entries of each head by `RoPE.table`, in float32."""
    cos, sin = table
    half = cos.shape[-1]
    x = x_btnh.astype(jnp.float32)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x_btnh[..., 2 * half :]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*(part.astype(x_btnh.dtype) for part in turned), rest], axis=-1)


class RotaryEmbedding(nnx.Module):
    """Rotates queries or keys: x_btnh, positions_bt -> x_btnh. It has no weights.

    `positions_bt` is [B, T] or [1, T]; None: 0..T-1 in every row.
    """

    def __init__(self, config: RoPE, head_dim: int):
        config.check(head_dim)
        self.config, self.head_dim = config, head_dim

    def __call__(self, x_btnh: jax.Array, positions_bt: jax.Array | None = None) -> jax.Array:
        if positions_bt is None:
            positions_bt = jnp.arange(x_btnh.shape[1])[None]
        return rotate(x_btnh, self.config.table(positions_bt, self.head_dim))


@dataclass(frozen=True, kw_only=True)
class ALiBi:
    """Subtracts slope * distance from the scores, with one slope per head (Press et al.,
    arXiv:2108.12409)."""

    def slopes(self, heads: int) -> np.ndarray:
        """[N] float32: a geometric series; if the number of heads is not a power of two, completed
        from the series of the next one."""
        power = 2 ** math.floor(math.log2(heads))
        series = [2 ** (-8 * (i + 1) / power) for i in range(power)]
        finer = [2 ** (-8 * (i + 1) / (2 * power)) for i in range(0, 2 * power, 2)]
        return np.array(series + finer[: heads - power], np.float32)


@dataclass(frozen=True, kw_only=True)
class NoPosition:
    """No positional encoding; only the causal mask orders tokens (Haviv et al.,
    arXiv:2203.16634)."""
