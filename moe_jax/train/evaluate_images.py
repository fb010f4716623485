"""Held-out denoising loss of images, and what each expert does."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.diffusion.processes import make_process
from moe_jax.infer.denoiser import denoiser
from moe_jax.models.base import ImageInputs
from moe_jax.moe import mixing
from moe_jax.moe.routing import Mixing, Mode
from moe_jax.parallel import batches
from moe_jax.quality import denoising, expert_use
from moe_jax.train.setup import Parts
from moe_jax.train.state import TrainState
from moe_jax.tree import struct

BINS = denoising.BINS
# Multiples of it fill (0, 1) evenly, as far as they go.
_GOLDEN = 0.6180339887498949
_CAPTURE = Mode(train=False, capture=True)


@struct
class Uses:
    """Assignments of experts over some held-out images, each at one time.

    Attributes:
      image_nle: (N, L, E) int, of each image.
      position_lep: (L, E, P) int, of each patch.
      bin_n: (N,) int, the image's bin of noise time.
      class_n: (N,) int.
    """

    image_nle: np.ndarray
    position_lep: np.ndarray
    bin_n: np.ndarray
    class_n: np.ndarray


class ImageEvaluator:
    """Scores images with the parameters of a state; compiles once.

    Args:
      parts: of the run.
    """

    def __init__(self, parts: Parts):
        self._parts = parts
        self._process = make_process(parts.config.objective.process)
        everywhere = NamedSharding(parts.mesh, PartitionSpec())
        self._losses = jax.jit(self._loss_sums, out_shardings=everywhere)
        self._bits = jax.jit(self._bit_sums, out_shardings=everywhere)
        self._uses = jax.jit(self._batch_uses, out_shardings=everywhere)

    def _conditions(self, batch) -> dict[str, jax.Array | None]:
        options, weights = self._parts.config.model, batch["weights"]
        return {
            "label": batch["labels"] if options.num_classes else None,
            "none": jnp.zeros(weights.shape, bool)
            if options.condition_dropout
            else None,
            "valid": weights > 0,
        }

    def _denoiser(self, state: TrainState, batch):
        given = (self._parts.model, state.eval_params, state.router_state)
        return denoiser(*given, self._process, **self._conditions(batch))

    def _rows(self, batch, first: jax.Array) -> jax.Array:
        return first + jnp.arange(len(batch["weights"]))

    def _loss_sums(self, state, batch, first):
        denoise, row_b = self._denoiser(state, batch), self._rows(batch, first)
        return denoising.loss_sums(self._process, denoise, batch, row_b)

    def _bit_sums(self, state, batch, first, num_images):
        denoise, row_b = self._denoiser(state, batch), self._rows(batch, first)
        return denoising.bit_sums(
            self._process, denoise, batch, row_b, num_images=num_images
        )

    def _batches(self, data: Any, max_batches: int) -> Iterator[tuple[Any, int]]:
        """Batches over the mesh, and the number of their first row."""
        parts, size = self._parts, self._parts.eval_batch_size
        first, count = batches.rows_of_process(parts.mesh, size)
        found = data.eval_batches(
            batch_size=size, max_batches=max_batches, rows=(first, count)
        )
        for number, batch in enumerate(found):
            yield batches.put(batch, parts.mesh, size, first), number * size

    def score(self, state: TrainState, data: Any, max_batches: int = 0) -> dict:
        """Figures over the held-out images, or their first `max_batches` batches.

        Noise and times are the same for every model and batch size.

        Returns:
          loss, the mean squared error over ten bins of noise time, each counting as
          much; by_time, that of each bin, next to data first; error, the standard error
          of the loss; images.
        """
        with jax.set_mesh(self._parts.mesh):
            sums = denoising.total(
                self._losses(state, batch, first)
                for batch, first in self._batches(data, max_batches)
            )
        if sums is None:
            return {}
        figures = denoising.loss_figures(sums)
        return {
            "loss": figures["denoising_loss"],
            "error": figures["denoising_error"],
            "by_time": (sums.loss / np.maximum(sums.weight, 1)).tolist(),
            "images": round(float(sums.weight.sum()) / BINS),
        }

    def bits(self, state: TrainState, data: Any, num_images: int) -> dict[str, float]:
        """Bits per dimension of the first `num_images` held-out images, by name."""
        most = -(-num_images // self._parts.eval_batch_size)
        with jax.set_mesh(self._parts.mesh):
            sums = denoising.total(
                self._bits(state, batch, first, num_images)
                for batch, first in self._batches(data, most)
            )
        return {} if sums is None else denoising.bit_figures(sums)

    def _batch_uses(self, state, batch, noise_time_b):
        """Assignments (L, E, B) by image and (L, E, P) by patch, of drawn noise."""
        process, options = self._process, self._parts.config.model
        x0, time = batch["images"], process.from_noise_time(noise_time_b)
        eps = jax.random.normal(jax.random.key(0), x0.shape, x0.dtype)
        inputs = ImageInputs(
            x=process.add_noise(x0, eps, time),
            time=process.network_time(time),
            **self._conditions(batch),
        )
        found = self._parts.model.apply(
            state.eval_params, state.router_state, inputs, key=None, mode=_CAPTURE
        )
        routing = found.aux.routing
        if isinstance(routing, Mixing):  # Every expert has a part in every patch.
            routing = jax.vmap(mixing.as_routing)(routing)
        size, patches = len(x0), options.num_tokens
        token_t = jnp.arange(size * patches)

        def by(group_t, groups):
            count = lambda expert_tk, valid_tk: expert_use.count(
                expert_tk, valid_tk, group_t, routing.num_experts, groups
            )
            return jax.vmap(count)(routing.expert_tk, routing.valid_tk)

        return by(token_t // patches, size), by(token_t % patches, patches)

    def expert_uses(
        self, state: TrainState, data: Any, max_batches: int = 8
    ) -> Uses | None:
        """What experts serve over some held-out images; None where there is no MoE."""
        if not self._parts.model.num_moe_layers:
            return None
        found = []
        with jax.set_mesh(self._parts.mesh):
            for batch, first in self._batches(data, max_batches):
                row_b = first + np.arange(len(batch["weights"]))
                time_b = (row_b * _GOLDEN % 1).astype(np.float32)
                by_image, by_patch = self._uses(state, batch, time_b)
                found.append((np.moveaxis(by_image, 2, 0), by_patch, time_b))
        if not found:
            return None
        images, patches, times = zip(*found, strict=True)
        classes = _classes(data, self._parts.eval_batch_size, max_batches)
        kept = len(classes)
        return Uses(
            image_nle=np.concatenate(images)[:kept],
            position_lep=np.sum(patches, axis=0),
            bin_n=(np.concatenate(times)[:kept] * BINS).astype(np.int64),
            class_n=classes,
        )


def _classes(data: Any, size: int, max_batches: int) -> np.ndarray:
    """Labels of the same images, padding left out; every process reads them all."""
    found = list(data.eval_batches(batch_size=size, max_batches=max_batches))
    labels = np.concatenate([batch["labels"] for batch in found])
    return labels[np.concatenate([batch["weights"] for batch in found]) > 0]
