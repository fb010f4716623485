"""Denoising of images: DDPM and rectified flow, by the process of the config."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax import config
from moe_jax.diffusion import guidance, losses, pairing, times, weights
from moe_jax.diffusion.processes import make_process
from moe_jax.diffusion.processes.base import Process
from moe_jax.diffusion.processes.variance_preserving import VariancePreserving
from moe_jax.models.base import ImageInputs, ImageModel
from moe_jax.models.masks.by_time import ByTime
from moe_jax.moe.routing import EVAL, Mode, Override
from moe_jax.nn import conditioning
from moe_jax.objectives.base import Batch, Loss


@config.node
class Denoising(config.ObjectiveConfig):
    """Squared error of what the network predicts at a drawn time.

    Attributes:
      process: path, prediction and unit of time; saved with the run.
      times: distribution of the times.
      weight: of the squared error, by time.
      pairing: which noise goes with which image.
      variational_weight: of the term of the variational bound, in bits, that trains
        the variance where the process learns it (Nichol and Dhariwal 2021); DiT: 1.
      cosine_weight: of the angle between prediction and target (FasterDiT).
      uncertainty: `L / e^u + u` with a u(t) that the model learns (EDM2); needs
        `model.log_variance`.
      model_guidance: w of the guidance that the network learns (Tang et al. 2025), by
        the averaged parameters; 0: none. Sampling then needs no second evaluation.
    """

    data_kind = "images"
    process: config.ProcessConfig = dataclasses.field(
        default_factory=VariancePreserving
    )
    times: config.TimesConfig = dataclasses.field(default_factory=times.Uniform)
    weight: config.LossWeightConfig = dataclasses.field(
        default_factory=weights.Constant
    )
    pairing: config.PairingConfig = dataclasses.field(
        default_factory=pairing.Independent
    )
    variational_weight: float = 1.0
    cosine_weight: float = 0.0
    uncertainty: bool = False
    model_guidance: float = 0.0

    @property
    def uses_average(self) -> bool:
        """Whether the loss looks at the averaged parameters."""
        return self.model_guidance > 0

    @property
    def learns_variance(self) -> bool:
        return getattr(self.process, "variance", "") == "learned_range"

    def problems(self, path, root):
        for name in ("variational_weight", "cosine_weight", "model_guidance"):
            if getattr(self, name) < 0:
                yield f"{path}.{name}={getattr(self, name)}: must not be negative"
        if self.learns_variance and not self.variational_weight:
            yield (
                f"{path}.variational_weight=0.0: nothing would train the variance of "
                f"{path}.process; set its variance to 'fixed_small', or the weight to 1"
            )
        if self.model_guidance and not root.train.ema_decay:
            yield (
                f"{path}.model_guidance={self.model_guidance} takes the averaged "
                "parameters, and there are none; set config.train.ema_decay"
            )
        if root.model is not None and root.model.data_kind == "images":
            yield from self._model_problems(path, root.model)

    def _model_problems(self, path, model):
        if self.learns_variance and not model.learned_variance:
            yield (
                f"{path}.process.variance='learned_range' needs twice the channels; "
                "set config.model.learned_variance=True, or the variance to "
                "'fixed_small'"
            )
        if self.uncertainty != model.log_variance:
            yield (
                f"{path}.uncertainty={self.uncertainty} with config.model."
                f"log_variance={model.log_variance}: set both or none"
            )
        if self.model_guidance and not model.condition_dropout:
            yield (
                f"{path}.model_guidance={self.model_guidance} needs a model that knows "
                "images without condition; set config.model.condition_dropout"
            )
        if isinstance(model.input_mask, ByTime):
            yield from self._mask_problems(model.input_mask)
        if model.condition_width:
            yield (
                f"config.model.condition_width={model.condition_width}: no data source "
                "gives vectors; set config.model.num_classes"
            )

    def _mask_problems(self, mask: ByTime):
        """The mask's ends of time are those of the process."""
        seen = self.process.network_ends
        if seen != (mask.data_time, mask.noise_time):
            yield (
                f"config.model.input_mask.data_time={mask.data_time}, noise_time="
                f"{mask.noise_time}: with config.objective.process="
                f"{type(self.process).__name__} the network sees {seen[0]:g} for data "
                f"and {seen[1]:g} for noise; set the mask's to those"
            )


def loss(
    options: Denoising,
    model: ImageModel,
    params: Any,
    router_state: Any,
    batch: Batch,
    *,
    key: jax.Array,
    mode: Mode,
    override: Override | None = None,
    average: Any = None,
) -> Loss:
    """Sums over the batch's images, each the mean of its pixels and channels.

    Args:
      options: the config.
      model: the code.
      params: nested dict of arrays.
      router_state: of the model.
      batch: images (B, H, W, C) float, labels (B,) int32, weights (B,) float.
      key: for times, noise, dropped conditions, and what draws in the model.
      mode: training or evaluation.
      override: imposed on the routers.
      average: averaged parameters, for `model_guidance`.
    """
    process = make_process(options.process)
    keys = jax.random.split(key, 4)
    x0, weight = batch["images"], batch["weights"]
    time = process.from_noise_time(times.draw(options.times, keys[0], weight.shape))
    eps = pairing.pair(options.pairing, keys[1], x0, weight)
    x = process.add_noise(x0, eps, time)
    inputs = ImageInputs(
        x=x,
        time=process.network_time(time),
        label=batch["labels"] if model.options.num_classes else None,
        none=_dropped(model, keys[2], weight.shape, mode),
        valid=weight > 0,
    )
    target = process.target(x0, eps, time)
    if options.uses_average:
        target = _guided(options, model, average, router_state, inputs, target)
    given = dict(key=keys[3], mode=mode, override=override)
    found = model.apply(params, router_state, inputs, **given)
    values, error_b = _values(options, process, found, x0, x, time, target)
    sums = lambda value_b: jnp.sum(jnp.where(weight > 0, value_b, 0) * weight)
    return Loss(
        sum=sums(values),
        reported=sums(error_b),
        weight=jnp.sum(weight, dtype=error_b.dtype),
        observations=found.observations,
        aux=found.aux,
        losses=found.losses,
    )


def _values(options, process: Process, found, x0, x, time, target):
    """What training minimises, and the squared error, each (B,)."""
    error_b = losses.mse(found.prediction, target)
    value_b = error_b * weights.WEIGHTS[type(options.weight)](
        options.weight, process, time
    )
    if options.uncertainty:
        value_b = losses.uncertainty(value_b, found.log_variance)
    if options.cosine_weight:
        value_b += options.cosine_weight * losses.cosine(found.prediction, target)
    if options.learns_variance:
        bits_b = losses.vb_bits(process, found.prediction, x0, x, time)
        value_b += options.variational_weight * bits_b
    return value_b, error_b


def _dropped(model: ImageModel, key, shape, mode: Mode) -> jax.Array | None:
    """(B,) bool: images whose condition is withheld, so that both are learned."""
    rate = model.options.condition_dropout
    if not rate:
        return None
    if not mode.train:
        return jnp.zeros(shape, bool)
    return conditioning.dropped(key, rate, shape)


def _guided(options, model, average, router_state, inputs: ImageInputs, target):
    """The target of model guidance; two evaluations of the averaged network."""

    def predict(none: bool):
        asked = dataclasses.replace(inputs, none=jnp.full(inputs.time.shape, none))
        found = model.apply(average, router_state, asked, key=None, mode=EVAL)
        return found.prediction

    average = jax.lax.stop_gradient(average)
    return guidance.model_guidance_target(
        target, predict(False), predict(True), options.model_guidance, inputs.none
    )
