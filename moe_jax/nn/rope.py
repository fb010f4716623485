"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and its stretchings.

A pair of a head's numbers turns by `position * frequency`; a scaling changes the
frequencies, so that a model reads longer texts than it was trained on. The tables are
those of Hugging Face transformers (`ROPE_INIT_FUNCTIONS`), computed in float64.
"""

import copy
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import config
from moe_jax.nn import module


@config.node
class Linear(config.RopeScalingConfig):
    """All frequencies divided by `factor` (Chen et al. 2023, arXiv:2306.15595)."""

    factor: float = 1.0

    def problems(self, path, root):
        yield from _least(self, path, 1.0, "factor")


@config.node
class Llama3(config.RopeScalingConfig):
    """Low frequencies divided, high ones kept, a ramp between (Llama 3.1).

    Attributes:
      factor: that divides.
      low_frequency_factor: pairs that turn less often than this over the original
        length are divided.
      high_frequency_factor: pairs that turn more often than this are kept.
      original_length: tokens of a text before the stretching.
    """

    factor: float = 8.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 8192

    def problems(self, path, root):
        yield from _least(self, path, 1.0, "factor", "original_length")
        if not 0 < self.low_frequency_factor < self.high_frequency_factor:
            yield (
                f"{path}.low_frequency_factor={self.low_frequency_factor}: must lie "
                f"between 0 and high_frequency_factor={self.high_frequency_factor}"
            )


@config.node
class YaRN(config.RopeScalingConfig):
    """As `Llama3` with a ramp over the pairs; scores grow too (arXiv:2309.00071).

    Attributes:
      factor: that divides the low frequencies.
      original_length: tokens of a text before the stretching.
      beta_fast: pairs that turn more often than this over the original length are kept.
      beta_slow: pairs that turn less often than this are divided whole.
      mscale: with `mscale_all_dim`, cosine and sine are multiplied by
        (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1); else by
        0.1 ln(factor) + 1.
      mscale_all_dim: `LatentAttention` also multiplies its scores by the square of the
        denominator (DeepSeek-V2).
      attention_factor: instead of that fraction; 0: by the formula.
      truncate: the ramp begins and ends at whole pairs.
    """

    factor: float = 1.0
    original_length: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float = 0.0
    truncate: bool = True

    def problems(self, path, root):
        yield from _least(self, path, 1.0, "factor", "original_length")
        names = ("mscale", "mscale_all_dim", "attention_factor")
        yield from _least(self, path, 0.0, *names)
        if not 0 < self.beta_slow < self.beta_fast:
            yield (
                f"{path}.beta_slow={self.beta_slow}: must lie between 0 and "
                f"beta_fast={self.beta_fast}"
            )
        if bool(self.mscale) != bool(self.mscale_all_dim) and not self.attention_factor:
            if self.mscale:
                yield (
                    f"{path}.mscale={self.mscale} counts only with mscale_all_dim; set "
                    "both, or set mscale to 0"
                )


@config.node
class LongRope(config.RopeScalingConfig):
    """A factor a pair, found by search (Ding et al. 2024, arXiv:2402.13753).

    Which factors hold depends on the longest text that the call has room for: the rows
    in training, the whole cache in generation. So keys in a cache fit together.

    Attributes:
      short_factor: that divide the frequencies up to the original length, one a pair.
      long_factor: beyond it.
      original_length: tokens of a text before the stretching.
      short_mscale: multiplies cosine and sine up to the original length.
      long_mscale: beyond it.
    """

    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    original_length: int = 4096
    short_mscale: float = 1.0
    long_mscale: float = 1.0

    def problems(self, path, root):
        yield from _least(self, path, 1.0, "original_length")
        for name in ("short_mscale", "long_mscale"):
            if getattr(self, name) <= 0:
                yield f"{path}.{name}={getattr(self, name)}: must be more than 0"
        for name in ("short_factor", "long_factor"):
            if any(factor <= 0 for factor in getattr(self, name)):
                yield f"{path}.{name}: every factor must be more than 0"


def _least(options, path, least, *names):
    for name in names:
        if getattr(options, name) < least:
            yield f"{path}.{name}={getattr(options, name)}: must be at least {least:g}"


@config.node
class Rope(config.Node):
    """How queries and keys turn.

    Attributes:
      theta: base of the wavelengths.
      fraction: share of a head's numbers that turn, the first ones.
      interleaved: the pairs are (2i, 2i + 1) (DeepSeek); else (i, i + half).
      scaling: one of `SCALINGS`; None: the frequencies as they are.
    """

    theta: float = 10000.0
    fraction: float = 1.0
    interleaved: bool = False
    scaling: config.RopeScalingConfig | None = None

    def turned(self, width: int) -> int:
        """Numbers that turn in a head of `width`."""
        return int(width * self.fraction)

    def shrunk(self, width: int) -> "Rope":
        """The same for heads of a smaller width."""
        small, pairs = copy.deepcopy(self), self.turned(width) // 2
        if isinstance(small.scaling, LongRope):
            small.scaling.short_factor = self.scaling.short_factor[:pairs]
            small.scaling.long_factor = self.scaling.long_factor[:pairs]
        return small

    def _has_share(self) -> bool:
        return 0 < self.fraction <= 1

    def problems(self, path, root):
        if self.theta <= 1:
            yield f"{path}.theta={self.theta}: must be more than 1"
        if not self._has_share():
            yield f"{path}.fraction={self.fraction}: must lie in (0, 1]"

    def width_problems(self, path: str, width: int, name: str):
        """Rules that need the width of a head; `name` is what set it."""
        if not self._has_share():
            return  # Told by `problems`.
        turned = self.turned(width)
        if turned % 2 or not turned:
            yield (
                f"{name}={width}: rotary positions turn pairs, and {path}.fraction="
                f"{self.fraction} of it is {turned}; set an even one"
            )
        for field in ("short_factor", "long_factor"):
            factors = getattr(self.scaling, field, None)
            if factors is not None and len(factors) != turned // 2:
                yield (
                    f"{path}.scaling.{field} has {len(factors)} factors: it needs one "
                    f"for each of {turned // 2} pairs"
                )


@dataclasses.dataclass(frozen=True)
class Table:
    """What a position is multiplied by, and the cosine and sine after that.

    Attributes:
      frequencies: (turned / 2,) float64, radians a position.
      magnitude: of cosine and sine.
    """

    frequencies: np.ndarray
    magnitude: float = 1.0


def _linear(options: Linear, rope: Rope, plain: np.ndarray, length: int) -> Table:
    return Table(plain / options.factor)


def _llama3(options: Llama3, rope: Rope, plain: np.ndarray, length: int) -> Table:
    turns = options.original_length * plain / (2 * math.pi)
    low, high = options.low_frequency_factor, options.high_frequency_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return Table(plain * (kept + (1 - kept) / options.factor))


def _grown(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _yarn(options: YaRN, rope: Rope, plain: np.ndarray, length: int) -> Table:
    width, factor = 2 * len(plain), options.factor

    def pair(turns):
        """Which pair turns that often over the original length."""
        wavelength = options.original_length / (turns * 2 * math.pi)
        return width * math.log(wavelength) / (2 * math.log(rope.theta))

    first, last = pair(options.beta_fast), pair(options.beta_slow)
    if options.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    steps = (last - first) or 0.001
    divided = np.clip((np.arange(len(plain)) - first) / steps, 0, 1)
    magnitude = options.attention_factor
    if not magnitude and options.mscale and options.mscale_all_dim:
        magnitude = _grown(factor, options.mscale)
        magnitude /= _grown(factor, options.mscale_all_dim)
    magnitude = magnitude or _grown(factor, 1.0)
    return Table(plain * (1 - divided + divided / factor), magnitude)


def _long(options: LongRope, rope: Rope, plain: np.ndarray, length: int) -> Table:
    if length > options.original_length:
        return Table(plain / np.array(options.long_factor), options.long_mscale)
    return Table(plain / np.array(options.short_factor), options.short_mscale)


SCALINGS = {Linear: _linear, Llama3: _llama3, YaRN: _yarn, LongRope: _long}


def table(rope: Rope, width: int, length: int) -> Table:
    """The frequencies of a head of `width`, in texts of at most `length` tokens."""
    turned = rope.turned(width)
    plain = rope.theta ** (-np.arange(0, turned, 2) / turned)
    if rope.scaling is None:
        return Table(plain)
    return SCALINGS[type(rope.scaling)](rope.scaling, rope, plain, length)


def latent_scale(rope: Rope) -> float:
    """What latent attention multiplies its scores by: `YaRN.mscale_all_dim`."""
    scaling = rope.scaling
    if isinstance(scaling, YaRN) and scaling.mscale_all_dim:
        return _grown(scaling.factor, scaling.mscale_all_dim) ** 2
    return 1.0


def rotate(
    x: jax.Array, positions: jax.Array, rope: Rope, *, length: int, scale: float = 1.0
) -> jax.Array:
    """Rotates the pairs of each head by `position * frequency`.

    Args:
      x: (B, S, H, Dh) queries or keys.
      positions: (B, S) int32, position within the document.
      rope: which pairs, and how fast.
      length: tokens of the longest text that this call has room for.
      scale: multiplies the result before it is rounded to the type of x.

    Returns:
      (B, S, H, Dh), in the type of x.
    """
    turned, made = rope.turned(x.shape[-1]), table(rope, x.shape[-1], length)
    dtype = module.accumulation_dtype(x.dtype)
    frequencies = jnp.asarray(made.frequencies, dtype)
    angles = positions[..., None, None].astype(dtype) * frequencies
    scaled = made.magnitude * scale
    cos, sin = jnp.cos(angles) * scaled, jnp.sin(angles) * scaled
    if rope.interleaved:
        first, second = x[..., :turned:2], x[..., 1:turned:2]
    else:
        first, second = x[..., : turned // 2], x[..., turned // 2 : turned]
    # Cast when cut: XLA:TPU keeps what is cast before in both types.
    first, second = first.astype(dtype), second.astype(dtype)
    both = first * cos - second * sin, second * cos + first * sin
    if rope.interleaved:
        out = jnp.stack(both, axis=-1).reshape(*x.shape[:-1], turned)
    else:
        out = jnp.concatenate(both, axis=-1)
    if turned < x.shape[-1]:
        rest = x[..., turned:].astype(dtype) * scale
        out = jnp.concatenate([out, rest], axis=-1)
    return out.astype(x.dtype)
