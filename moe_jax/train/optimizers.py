"""Optimizers from optax, with parameter groups by path."""

import re
from typing import Any

import jax
import optax

from moe_jax import config
from moe_jax.nn.module import Params
from moe_jax.train import moments
from moe_jax.tree import path_name


@config.node
class ParamGroup(config.Node):
    """What is special about the parameters whose path matches.

    The first group that matches a parameter counts.

    Attributes:
      pattern: regular expression, searched in the path (`segment_0/block_0/moe/...`).
      frozen: never changed; no gradient, no optimizer state.
      decay: whether weight decay applies.
      rate: factor on the learning rate.
    """

    pattern: str = ""
    frozen: bool = False
    decay: bool = True
    rate: float = 1.0

    def problems(self, path, root):
        try:
            re.compile(self.pattern)
        except re.error as error:
            yield f"{path}.pattern={self.pattern!r}: not a regular expression: {error}"
        if not self.pattern:
            yield f"{path}.pattern is empty: it would match every parameter"
        if self.rate < 0:
            yield f"{path}.rate={self.rate}: must not be negative"
        if self.frozen and self.rate != 1.0:
            yield f"{path}.rate={self.rate} would be ignored: the group is frozen"


# Scales whose neutral value is not 0: of norms, of a cosine router, of the output.
NO_DECAY = (
    ParamGroup(
        pattern=r"(^|/|_)norm/scale$|/scorer/log_scale$|/output_scale$", decay=False
    ),
)


@config.node
class BaseOptimizer(config.OptimizerConfig):
    """What all optimizers have.

    Attributes:
      learning_rate: the peak of the schedule.
      weight_decay: decoupled: multiplied by the learning rate, not by the gradient.
      clip_norm: largest global norm of the gradient; 0: no clipping.
      groups: parameters that are treated otherwise.
    """

    learning_rate: float = 3e-4
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    groups: tuple[ParamGroup, ...] = NO_DECAY

    def problems(self, path, root):
        if self.learning_rate <= 0:
            yield f"{path}.learning_rate={self.learning_rate}: must be positive"
        for name in ("weight_decay", "clip_norm"):
            if getattr(self, name) < 0:
                yield f"{path}.{name}={getattr(self, name)}: must not be negative"


@config.node
class AdamW(BaseOptimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019).

    Attributes:
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      momentum_dtype: in which the first moment is kept from step to step; "": that of
        the weights; "int8": in blocks (`train.moments`). The update of a step has all
        its digits.
      variance_dtype: the same of the second moment, "" or "int8".
      block_size: entries that share a scale, with "int8".
    """

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    momentum_dtype: str = ""
    variance_dtype: str = ""
    block_size: int = 64

    @property
    def packs(self) -> bool:
        """Whether a moment is kept in blocks of eight bits a number."""
        return moments.INT8 in (self.momentum_dtype, self.variance_dtype)

    def problems(self, path, root):
        yield from BaseOptimizer.problems(self, path, root)
        if self.variance_dtype not in ("", moments.INT8):
            yield f"{path}.variance_dtype={self.variance_dtype!r}: must be '' or 'int8'"
        if self.block_size < 8:
            yield f"{path}.block_size={self.block_size}: must be at least 8"
        if self.block_size != AdamW().block_size and not self.packs:
            yield (
                f"{path}.block_size={self.block_size} would be ignored: no moment is "
                "kept in 'int8'"
            )
        if self.momentum_dtype not in ("", moments.INT8):
            yield from config.dtype_problems(self, path, "momentum_dtype")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                yield f"{path}.{name}={getattr(self, name)}: must lie in [0, 1)"


@config.node
class Adafactor(BaseOptimizer):
    """Adafactor (Shazeer and Stern 2018): factored second moments, no first one.

    Attributes:
      decay_rate: exponent c of the second moment's decay `1 - t^-c`.
      update_clip: largest root mean square of a parameter's update.
      min_dim: dimensions smaller than this are not factored.
    """

    decay_rate: float = 0.8
    update_clip: float = 1.0
    min_dim: int = 128

    def problems(self, path, root):
        yield from BaseOptimizer.problems(self, path, root)
        if not 0 < self.decay_rate < 1:
            yield f"{path}.decay_rate={self.decay_rate}: must lie in (0, 1)"
        if self.update_clip <= 0 or self.min_dim < 1:
            yield f"{path}: update_clip and min_dim must be positive"


def _adamw(options: AdamW) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(options.b1, options.b2, options.eps)

    def narrow(state):
        return state._replace(
            mu=_kept(options, options.momentum_dtype, True, state.mu, state.count),
            nu=_kept(options, options.variance_dtype, False, state.nu, state.count),
        )

    def update(updates, state, params=None):
        # The `mu_dtype` of optax would also multiply in it, by b1 rounded to it.
        moments_of = lambda kept: _wide(kept, updates)
        wide = state._replace(mu=moments_of(state.mu), nu=moments_of(state.nu))
        updates, state = adam.update(updates, wide, params)
        return updates, narrow(state)

    return optax.GradientTransformation(
        lambda params: narrow(adam.init(params)), update
    )


def _kept(options, dtype, signed, moment, step):
    """A moment as it is kept from step to step."""
    if dtype == moments.INT8:
        return moments.pack(moment, options.block_size, signed, step)
    return optax.tree.cast(moment, dtype or None)


def _wide(kept, like):
    """The reverse of `_kept`, in the types of these arrays."""
    if moments.is_pack(kept):
        return moments.unpack(kept, like)
    return optax.tree.cast_like(kept, like)


def _adafactor(options: Adafactor) -> optax.GradientTransformation:
    return optax.chain(
        optax.scale_by_factored_rms(
            decay_rate=options.decay_rate, min_dim_size_to_factor=options.min_dim
        ),
        optax.clip_by_block_rms(options.update_clip),
    )


OPTIMIZERS = {AdamW: _adamw, Adafactor: _adafactor}


def group_of(options: config.OptimizerConfig, name: str) -> ParamGroup:
    """The group of the parameter with this path."""
    for group in options.groups:
        if re.search(group.pattern, name):
            return group
    return ParamGroup(pattern=".*")


def _by_group(options, params: Params, value) -> Params:
    of_leaf = lambda path, _: value(group_of(options, path_name(path)))
    return jax.tree_util.tree_map_with_path(of_leaf, params)


def split(options: config.OptimizerConfig, params: Params) -> tuple[Params, Params]:
    """Trainable and frozen parameters, each without the leaves of the other."""
    frozen = _by_group(options, params, lambda group: group.frozen)
    return _filter(params, frozen, False), _filter(params, frozen, True)


def _filter(tree: Any, mask: Any, wanted: bool) -> Any:
    if not isinstance(tree, dict):
        return tree
    kept = {}
    for name, child in tree.items():
        if isinstance(child, dict):
            child = _filter(child, mask[name], wanted)
            if child:
                kept[name] = child
        elif mask[name] == wanted:
            kept[name] = child
    return kept


def merge(trainable: Params, frozen: Params) -> Params:
    """The inverse of `split`."""
    merged = dict(trainable)
    for name, child in frozen.items():
        both = isinstance(child, dict) and name in merged
        merged[name] = merge(merged[name], child) if both else child
    return merged


def _scale_by_rate(peak: float, schedule: optax.Schedule):
    """Multiplies by minus the rate of `step`, an extra argument of `update`.

    A count of its own would stay behind where the NaN guard skips a step.
    """

    def update(updates, state, params=None, *, step, **others):
        rate = -peak * schedule(step)
        return jax.tree.map(lambda u: (rate * u).astype(u.dtype), updates), state

    init = lambda params: optax.EmptyState()
    return optax.GradientTransformationExtraArgs(init, update)


def in_turns(whole: config.Config) -> bool:
    """Whether parameters are updated one after another (`train.turns`)."""
    packs = isinstance(whole.optimizer, AdamW) and whole.optimizer.packs
    return packs or whole.train.offload_optimizer


def check(options: config.OptimizerConfig, params: Params) -> None:
    """Raises UserError where parameters lie so that an option cannot hold."""
    if isinstance(options, AdamW) and options.packs:
        moments.check(params, options.block_size)


def clip(options: config.OptimizerConfig) -> optax.GradientTransformation:
    """Scales gradients to the largest norm, the one step that meets all of them."""
    if not options.clip_norm:
        return optax.identity()
    return optax.clip_by_global_norm(options.clip_norm)


def make_optimizer(
    options: config.OptimizerConfig, schedule: optax.Schedule, *, clips: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Clip, scale by moments, decay, scale by the rate; groups by path.

    Its `update` takes the number of steps done before as `step`.

    Args:
      options: the config.
      schedule: step -> factor of the rate.
      clips: False where gradients come clipped; the state has the same places.
    """

    def scale_by_group(updates, params=None):
        rates = _by_group(options, updates, lambda group: group.rate)
        return jax.tree.map(lambda u, rate: u * rate, updates, rates)

    decayed = lambda params: _by_group(options, params, lambda group: group.decay)
    steps = []
    if options.clip_norm:
        steps.append(clip(options) if clips else optax.identity())
    steps.append(OPTIMIZERS[type(options)](options))
    if options.weight_decay:
        steps.append(optax.add_decayed_weights(options.weight_decay, mask=decayed))
    steps.append(_scale_by_rate(options.learning_rate, schedule))
    if any(group.rate != 1.0 for group in options.groups):
        steps.append(optax.stateless(scale_by_group))
    return optax.chain(*steps)
