"""Learning rate schedules: step -> factor of the peak rate."""

import jax.numpy as jnp
import optax

from moe_jax import config


@config.node
class BaseSchedule(config.ScheduleConfig):
    """Attributes: warmup_steps, steps of linear growth from 0."""

    warmup_steps: int = 100

    def problems(self, path, root):
        if not 0 <= self.warmup_steps <= root.train.steps:
            yield (
                f"{path}.warmup_steps={self.warmup_steps}: must lie in "
                f"[0, config.train.steps={root.train.steps}]"
            )


@config.node
class Constant(BaseSchedule):
    """Warm-up, then the peak rate."""


@config.node
class Cosine(BaseSchedule):
    """Warm-up, then half a cosine down to `final`, reached just after the last step.

    Attributes:
      final: factor of the peak rate at the end.
    """

    final: float = 0.1

    def problems(self, path, root):
        yield from BaseSchedule.problems(self, path, root)
        yield from _final_problems(self.final, path)


@config.node
class WarmupStableDecay(BaseSchedule):
    """Warm-up, the peak rate, and a decay `1 - sqrt(t)` (Haegele et al. 2024).

    Attributes:
      decay_fraction: share of the steps that the decay takes.
      final: factor of the peak rate at the end.
    """

    decay_fraction: float = 0.2
    final: float = 0.0

    def problems(self, path, root):
        yield from BaseSchedule.problems(self, path, root)
        yield from _final_problems(self.final, path)
        if not 0 < self.decay_fraction <= 1:
            yield f"{path}.decay_fraction={self.decay_fraction}: must lie in (0, 1]"
        elif self.warmup_steps > (1 - self.decay_fraction) * root.train.steps:
            yield (
                f"{path}.warmup_steps={self.warmup_steps} reaches into the decay, the "
                f"last {self.decay_fraction:g} of {root.train.steps} steps"
            )


def _final_problems(final: float, path: str):
    if not 0 <= final <= 1:
        yield f"{path}.final={final}: must lie in [0, 1]"


def _constant(options: Constant, steps: int) -> optax.Schedule:
    return optax.constant_schedule(1.0)


def _cosine(options: Cosine, steps: int) -> optax.Schedule:
    return optax.cosine_decay_schedule(1.0, max(1, steps), alpha=options.final)


def _wsd(options: WarmupStableDecay, steps: int) -> optax.Schedule:
    total = steps + options.warmup_steps
    decay = max(1, round(options.decay_fraction * total))

    def factor(step):
        t = jnp.clip((step - (steps - decay)) / decay, 0.0, 1.0)
        return options.final + (1 - options.final) * (1 - jnp.sqrt(t))

    return factor


SCHEDULES = {Constant: _constant, Cosine: _cosine, WarmupStableDecay: _wsd}


def make_schedule(options: config.ScheduleConfig, steps: int) -> optax.Schedule:
    """The factor at each step of a run of `steps` steps, warm-up included."""
    warmup = options.warmup_steps
    rest = SCHEDULES[type(options)](options, steps - warmup)
    if not warmup:
        return rest
    ramp = optax.linear_schedule(0.0, 1.0, warmup)
    # Step 0 already learns: the ramp reaches 1 at step `warmup` - 1.
    return optax.join_schedules([lambda step: ramp(step + 1), rest], [warmup])
