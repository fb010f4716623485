"""The layouts that a config could have: meshes, micro-batches, remat, dispatch.

Whatever changes the training is left alone: the global batch, the sequence length,
the model, and whether assignments may be dropped.
"""

import copy
import dataclasses
import math
from collections.abc import Iterator

from moe_jax.config import Config, DispatchConfig, MeshConfig, validate
from moe_jax.errors import UserError
from moe_jax.moe.dispatch import DISPATCHES, MAY_DROP
from moe_jax.moe.dispatch.auto import Auto
from moe_jax.moe.layer import MoE
from moe_jax.parallel import rules
from moe_jax.parallel.mesh import AXES

_REMATS = (
    "none",
    "full",
    "dots",
    "exchanges",
    "attention+exchanges",
    "attention+exchanges+hidden",
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What sets two layouts of a config apart.

    Attributes:
      mesh: sizes of the mesh axes, in order.
      accumulation: micro-batches per step.
      remat: what is recomputed.
      dispatch: the class's name; "" without experts.
    """

    mesh: tuple[int, ...]
    accumulation: int
    remat: str
    dispatch: str

    def is_neighbour(self, other: "Settings") -> bool:
        """Whether one setting differs; of a mesh, two axes."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        different = [i for i, (a, b) in enumerate(pairs) if a != b]
        if different != [0]:
            return len(different) == 1
        return sum(a != b for a, b in zip(self.mesh, other.mesh, strict=True)) == 2

    def __str__(self) -> str:
        sizes = zip(AXES, self.mesh, strict=True)
        mesh = " ".join(f"{axis}={n}" for axis, n in sizes if n > 1) or "one device"
        micro = f"accumulation={self.accumulation}"
        return " ".join(
            part for part in (mesh, micro, f"remat={self.remat}", self.dispatch) if part
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A legal layout.

    Attributes:
      settings: what it is.
      config: the experiment in it.
      flags: overrides that make it of the config as given.
      python: lines for the config file, of what no flag can set.
    """

    settings: Settings
    config: Config
    flags: tuple[str, ...]
    python: tuple[str, ...]

    @property
    def sizes(self) -> dict[str, int]:
        return dict(zip(AXES, self.settings.mesh, strict=True))


def factorizations(n: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to write n as an ordered product of `parts` numbers."""
    if parts == 1:
        yield (n,)
        return
    for first in range(1, n + 1):
        if n % first == 0:
            for rest in factorizations(n // first, parts - 1):
                yield (first, *rest)


def meshes(num_devices: int, context: int, slices: int = 1) -> list[tuple[int, ...]]:
    """Sizes of the axes of every mesh with this context; slices split data."""
    if num_devices % context:
        return []
    found = []
    for data, fsdp, expert, tensor in factorizations(num_devices // context, 4):
        if data % slices == 0:
            found.append((data, fsdp, expert, context, tensor))
    return found


def is_legal(config: Config) -> bool:
    """Whether the trainer takes the config; its mesh without -1."""
    try:
        validate(config)
    except UserError:
        return False
    rows = config.train.batch_size // config.train.accumulation
    return rows % math.prod(getattr(config.mesh, a) for a in rules.RULES["batch"]) == 0


def dispatches(config: Config) -> list[DispatchConfig | None]:
    """The config's own dispatch, then others that are as exact; [None] if dense."""
    ff = config.model.feed_forward
    if not isinstance(ff, MoE):
        return [None]
    lossy = isinstance(ff.dispatch, MAY_DROP)
    others = [
        kind()
        for kind in DISPATCHES
        # `Auto` is one of the others.
        if kind not in (type(ff.dispatch), Auto) and (lossy or kind not in MAY_DROP)
    ]
    return [ff.dispatch, *others]


def settings_of(config: Config, num_devices: int) -> Settings:
    """The layout that a config has itself."""
    sizes = config.mesh.sizes(num_devices)
    ff = config.model.feed_forward
    return Settings(
        mesh=tuple(sizes[axis] for axis in AXES),
        accumulation=config.train.accumulation,
        remat=config.model.remat,
        dispatch=type(ff.dispatch).__name__ if isinstance(ff, MoE) else "",
    )


def candidates(config: Config, num_devices: int, slices: int = 1) -> list[Candidate]:
    """Every legal layout of a config on so many devices.

    Raises:
      UserError: there is none.
    """
    found = []
    batch = config.train.batch_size
    for mesh in meshes(num_devices, config.mesh.context, slices):
        shards = math.prod(mesh[AXES.index(axis)] for axis in rules.RULES["batch"])
        for accumulation in range(1, batch // shards + 1):
            if batch % (accumulation * shards):
                continue
            trial = copy.deepcopy(config)
            trial.mesh = MeshConfig(**dict(zip(AXES, mesh, strict=True)))
            trial.train.accumulation = accumulation
            if is_legal(trial):
                found += _variants(config, trial, num_devices)
    if not found:
        raise UserError(
            f"no mesh of {num_devices} devices suits this config: "
            f"config.train.batch_size={batch} must be a multiple of data * fsdp * "
            "expert, and config.model's widths of the axes that split them (see "
            "docs/parallelism.md)"
        )
    return found


def _variants(config: Config, trial: Config, num_devices: int) -> Iterator[Candidate]:
    for dispatch in dispatches(config):
        for remat in _REMATS:
            one = copy.deepcopy(trial)
            one.model.remat = remat
            python: tuple[str, ...] = ()
            if dispatch is not None:
                one.model.feed_forward.dispatch = dispatch
                python = _python(config, dispatch)
            yield Candidate(
                settings=settings_of(one, num_devices),
                config=one,
                flags=_flags(config, one),
                python=python,
            )


def _python(config: Config, dispatch: DispatchConfig) -> tuple[str, ...]:
    if dispatch is config.model.feed_forward.dispatch:
        return ()
    kind = type(dispatch)
    values = ", ".join(
        f"{f.name}={getattr(dispatch, f.name)!r}" for f in dataclasses.fields(dispatch)
    )
    return (
        f"from {kind.__module__} import {kind.__name__}",
        f"config.model.feed_forward.dispatch = {kind.__name__}({values})",
    )


def _flags(old: Config, new: Config) -> tuple[str, ...]:
    """Overrides for what differs; data=-1 stays, it takes what remains."""
    flags = []
    for axis in AXES:
        was, size = getattr(old.mesh, axis), getattr(new.mesh, axis)
        if was not in (size, -1):
            flags.append(f"--config.mesh.{axis}={size}")
    if new.train.accumulation != old.train.accumulation:
        flags.append(f"--config.train.accumulation={new.train.accumulation}")
    if new.model.remat != old.model.remat:
        flags.append(f"--config.model.remat={new.model.remat}")
    return tuple(flags)
