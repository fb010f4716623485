"""Guidance: two denoisers made one, for a sampler.

Each is `(options, process, main, other) -> guided`, where main and other are denoisers
and guided is `(x, time) -> Guided`. All rows of a sampler's batch have one time. The
two are evaluated one after the other, never as one batch: a router that compares the
tokens of a batch must not let the branches compete.

| guidance | main | other |
|---|---|---|
| `Unguided` | the condition | none |
| `ClassifierFree`, `CFGPlusPlus` | the condition | the null condition |
| `Autoguidance` | the condition | a worse network, the same condition |

The scale w is that of `other + w (main - other)`: at 1 there is no guidance, and the
second denoiser is not evaluated. (Others write `main + w' (main - other)`, with
w' = w - 1.) It acts on what the network predicts; x0, eps and velocity give the same,
since at a given x they are affine in each other.
"""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from moe_jax import config
from moe_jax.diffusion.processes.base import Process
from moe_jax.errors import UserError
from moe_jax.tree import struct

Array = jax.Array
Denoiser = Callable[[Array, Array], Array]
UNITS = ("time", "sigma")


@struct
class Guided:
    """What a guided denoiser says at one time.

    Attributes:
      prediction: (B, H, W, C_out), as a denoiser's.
      renoise: (B, H, W, C_out), the prediction from which a step back to noise takes
        eps; another than `prediction` with CFG++ alone.
      evaluations: () int32, networks that were evaluated on the batch.
    """

    prediction: Array
    renoise: Array
    evaluations: Array


GuidedDenoiser = Callable[[Array, Array], Guided]


@config.node
class Unguided(config.GuidanceConfig):
    """The denoiser alone."""


@config.node
class Interval(config.GuidanceConfig):
    """Guidance at the noise levels in (low, high] alone.

    Elsewhere the second denoiser is not evaluated (Kynkaanniemi et al. 2024,
    2404.07724).

    Attributes:
      scale: w of `other + w (main - other)`; 1: none.
      low: noise level above which it acts.
      high: noise level up to which it acts; 0: no bound.
      unit: of the noise level: "time" (0 is data, 1 is noise; an index t of T counts as
        (t + 1/2) / T) or "sigma" (sigma / alpha).
    """

    scale: float = 1.5
    low: float = 0.0
    high: float = 0.0
    unit: str = "time"

    def problems(self, path, root) -> Iterator[str]:
        if self.unit not in UNITS:
            yield f"{path}.unit={self.unit!r}: must be one of {UNITS}"
        if self.low < 0 or (self.high and self.high <= self.low):
            yield (
                f"{path}.low={self.low}, {path}.high={self.high}: must be "
                "0 <= low < high, or high=0 for no bound"
            )


@config.node
class ClassifierFree(Interval):
    """Away from the null condition (Ho & Salimans 2022, 2207.12598).

    Attributes:
      channels: the first channels that are guided, the rest keep the conditional
        prediction; 0: all C. DiT guides 3 of its 4.
    """

    channels: int = 0

    def problems(self, path, root):
        yield from Interval.problems(self, path, root)
        if self.channels < 0:
            yield f"{path}.channels={self.channels}: must not be negative"


@config.node
class Autoguidance(Interval):
    """Away from a worse version of the network (Karras et al. 2024, 2406.02507).

    Attributes:
      top_k: experts per token of the worse version, which is the same mixture of
        experts with fewer of them.
    """

    top_k: int = 1

    def problems(self, path, root):
        yield from Interval.problems(self, path, root)
        if self.top_k < 1:
            yield f"{path}.top_k={self.top_k}: must be at least 1"


@config.node
class CFGPlusPlus(config.GuidanceConfig):
    """x0 of the guided prediction, eps of the null condition (Chung et al. 2024).

    2406.08070. For `DDIM` alone, whose step adds the noise again. At scale 0 it is
    unconditional DDIM.

    Attributes:
      scale: lambda in [0, 1].
    """

    scale: float = 0.6

    def problems(self, path, root):
        if not 0 <= self.scale <= 1:
            yield f"{path}.scale={self.scale}: must lie in [0, 1]"


def combine(main: Array, other: Array, scale: float, channels: int) -> Array:
    """`other + scale (main - other)` on the first channels, main on the rest."""
    first = other[..., :channels]
    guided = first + scale * (main[..., :channels] - first)
    return jnp.concatenate([guided, main[..., channels:]], axis=-1)


def _one(prediction: Array) -> Guided:
    return Guided(prediction=prediction, renoise=prediction, evaluations=jnp.int32(1))


def _unguided(options, process: Process, main: Denoiser, other) -> GuidedDenoiser:
    return lambda x, time: _one(main(x, time))


def _acts(options: Interval, process: Process, x: Array, time: Array) -> Array:
    """() bool: whether the noise level lies in the interval."""
    level = process.noise_time(time[:1])
    if options.unit == "sigma":
        alpha, sigma = process.levels(time[:1], jnp.zeros((1,), x.dtype))
        level = sigma / alpha
    above = level[0] > options.low
    return above & (level[0] <= options.high) if options.high else above


def _away(options: Interval, process, main, other, channels: int) -> GuidedDenoiser:
    def both(x, time):
        count = channels or x.shape[-1]
        if count > x.shape[-1]:
            raise UserError(
                f"guidance channels={count}: the images have {x.shape[-1]} channels; "
                "0 guides all"
            )
        guided = combine(main(x, time), other(x, time), options.scale, count)
        return Guided(prediction=guided, renoise=guided, evaluations=jnp.int32(2))

    def alone(x, time):
        return _one(main(x, time))

    def where_it_acts(x, time):
        return jax.lax.cond(_acts(options, process, x, time), both, alone, x, time)

    if options.scale == 1:
        return alone
    return where_it_acts if options.low or options.high else both


def _classifier_free(options: ClassifierFree, process, main, other):
    return _away(options, process, main, other, options.channels)


def _autoguidance(options: Autoguidance, process, main, other):
    return _away(options, process, main, other, 0)


def _cfg_plus_plus(options: CFGPlusPlus, process, main, other):
    def guided(x, time):
        null = other(x, time)
        prediction = combine(main(x, time), null, options.scale, x.shape[-1])
        return Guided(prediction=prediction, renoise=null, evaluations=jnp.int32(2))

    return guided


GUIDANCES = {
    Unguided: _unguided,
    ClassifierFree: _classifier_free,
    CFGPlusPlus: _cfg_plus_plus,
    Autoguidance: _autoguidance,
}


def guide(
    options: config.GuidanceConfig,
    process: Process,
    main: Denoiser,
    other: Denoiser | None = None,
) -> GuidedDenoiser:
    """The guided denoiser.

    Raises:
      UserError: a second denoiser that is missing, or would be ignored.
    """
    name = type(options).__name__
    if isinstance(options, Unguided) != (other is None):
        raise UserError(
            f"guidance {name}: takes {'one denoiser' if other else 'two denoisers'}"
        )
    return GUIDANCES[type(options)](options, process, main, other)


def model_guidance_target(
    target: Array,
    conditional: Array,
    unconditional: Array,
    scale: float,
    dropped: Array,
) -> Array:
    """The target of training that makes guidance part of the network.

    `target + w sg(conditional - unconditional)` (Tang et al. 2025, 2502.12154), so that
    sampling takes one evaluation a step. Images whose label was dropped keep the plain
    target.

    Args:
      target: (B, H, W, C), of the process.
      conditional: (B, H, W, C_out), predicted by the average of the parameters.
      unconditional: the same for the null condition.
      scale: w; 0: the plain target.
      dropped: (B,) bool.
    """
    channels = target.shape[-1]
    step = jax.lax.stop_gradient(conditional - unconditional)[..., :channels]
    return jnp.where(dropped[:, None, None, None], target, target + scale * step)
