"""Images out of a trained diffusion transformer."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.config import Config, GuidanceConfig, SamplerConfig
from moe_jax.diffusion import guidance, samplers
from moe_jax.diffusion.processes import make_process
from moe_jax.errors import UserError
from moe_jax.infer.denoiser import denoiser
from moe_jax.models.base import RouterState
from moe_jax.moe.layer import MoE
from moe_jax.moe.routing import Override
from moe_jax.nn.module import Params
from moe_jax.parallel import rules


def check(config: Config, guided_by: GuidanceConfig) -> None:
    """Raises UserError where the model cannot be sampled so."""
    model, name = config.model, type(guided_by).__name__
    if isinstance(guided_by, guidance.Unguided):
        return
    if not isinstance(guided_by, guidance.Autoguidance):
        if not model.condition_dropout:
            raise UserError(
                f"guidance {name}: the model always had a condition "
                "(config.model.condition_dropout=0.0) and cannot do without; train "
                "with 0.1, or sample without guidance"
            )
        return
    ff = model.feed_forward
    if not isinstance(ff, MoE) or getattr(ff.selector, "top_k", 0) <= guided_by.top_k:
        raise UserError(
            f"guidance {name}.top_k={guided_by.top_k}: the worse network has fewer "
            "experts per token than the model, which must choose its experts by "
            "top_k, and more of them"
        )


class ImageSampler:
    """Draws images; compiles once.

    Args:
      parts: of the run.
      sampler: the method.
      guided_by: its guidance.
      batch: images drawn at once, at least; filled up to what the mesh splits evenly.

    Raises:
      UserError: what does not combine.
    """

    def __init__(
        self,
        parts: Any,
        sampler: SamplerConfig,
        guided_by: GuidanceConfig,
        batch: int,
    ):
        config = parts.config
        check(config, guided_by)
        self._mesh, self._model, self._options = parts.mesh, parts.model, config.model
        self._process = make_process(config.objective.process)
        self._sampler, self._guided_by = sampler, guided_by
        together = rules.size(parts.mesh, "batch") * config.model.rows_together()
        self._batch = -(-batch // together) * together
        everywhere = NamedSharding(parts.mesh, PartitionSpec())
        self._run = jax.jit(self._draw, out_shardings=everywhere)

    def _denoisers(self, params, router_state, label, valid):
        given = (self._model, params, router_state, self._process)
        knows_none = self._options.condition_dropout > 0

        def one(without: bool = False, override: Override | None = None):
            none = jnp.full(valid.shape, without) if knows_none else None
            said = dict(label=label, none=none, valid=valid, override=override)
            return denoiser(*given, **said)

        if isinstance(self._guided_by, guidance.Unguided):
            return one(), None
        if isinstance(self._guided_by, guidance.Autoguidance):
            return one(), one(override=Override(top_k=self._guided_by.top_k))
        return one(), one(without=True)

    def _draw(self, params, router_state, label, valid, row_b, key):
        size, channels = self._options.image_size, self._options.in_channels
        first, key = jax.random.split(key)
        shape = (size, size, channels)
        one = lambda row: jax.random.normal(jax.random.fold_in(first, row), shape)
        x = rules.constrain(jax.vmap(one)(row_b), "batch", None, None, None)
        key = jax.random.fold_in(key, row_b[0])
        main, other = self._denoisers(params, router_state, label, valid)
        return samplers.sample(
            self._sampler, self._guided_by, self._process, main, other, x, key
        )

    def draw(
        self,
        params: Params,
        router_state: RouterState,
        labels: Sequence[int],
        seed: int,
    ) -> Iterator[tuple[np.ndarray, int]]:
        """Yields images (b, H, W, C) of these classes, and network evaluations.

        Image n depends on the seed, its class and n alone, not on the mesh; also on its
        batch with a router that compares images, or a sampler that adds fresh noise.

        Args:
          params: weights.
          router_state: of the model.
          labels: a class an image; of a model without classes their number counts.
          seed: of the noise.
        """
        labels = np.asarray(labels, np.int32)
        for begin in range(0, len(labels), self._batch):
            part = labels[begin : begin + self._batch]
            filled = np.zeros(self._batch, np.int32)
            filled[: len(part)] = part
            with jax.set_mesh(self._mesh):
                found = self._run(
                    params,
                    router_state,
                    filled if self._options.num_classes else None,
                    np.arange(self._batch) < len(part),
                    (begin + np.arange(self._batch)).astype(np.int32),
                    jax.random.key(seed),
                )
            yield np.asarray(found.images)[: len(part)], int(found.evaluations)


def classes_in_turn(count: int, num_classes: int) -> np.ndarray:
    """(count,) int32: 0, 1, 2, ... and again from 0."""
    return (np.arange(count) % max(1, num_classes)).astype(np.int32)
