"""Runs a config's training step on one device and on meshes, and compares."""

import copy
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moe_jax import config as config_lib
from moe_jax.check import compare, rows
from moe_jax.check.compare import Difference, Record
from moe_jax.config import Config, MeshConfig, Node
from moe_jax.moe.routing import Mode, Override, Routing
from moe_jax.parallel import batches
from moe_jax.train import setup, step
from moe_jax.train.setup import Parts
from moe_jax.train.state import TrainState

_LEAST_ROWS = 8
_CAPTURE = Mode(train=True, capture=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """One mesh against one device in one precision.

    Attributes:
      mesh: as the user wrote it.
      dtype: of parameters and computation.
      differences: of every quantity.
      dropped: assignments lost on the mesh and on one device.
      near_ties: tokens close to another choice, per MoE layer.
    """

    mesh: str
    dtype: str
    differences: list[Difference]
    dropped: tuple[int, int]
    near_ties: list[int]

    @property
    def worst(self) -> Difference:
        """The difference that exceeds what is allowed the most."""
        scale = lambda d: d.error / d.allowed if d.allowed else d.error * math.inf
        excess = lambda d: 0.0 if d.error == 0 else scale(d)
        return max(
            self.differences,
            key=lambda d: math.inf if math.isnan(d.error) else excess(d),
        )

    @property
    def passed(self) -> bool:
        return all(d.passed for d in self.differences) and not any(self.dropped)


def with_dtype(config: Config, dtype: str) -> Config:
    """The config with every floating point type of the model set to `dtype`."""
    config = copy.deepcopy(config)

    def visit(value: Node) -> None:
        for field in dataclasses.fields(value):
            if field.name in ("dtype", "param_dtype"):
                setattr(value, field.name, dtype)
        for _, child in config_lib.children(value, ""):
            visit(child)

    visit(config.model)
    return config


def prepare(config: Config, meshes: dict[str, MeshConfig], shrink: bool) -> Config:
    """The config to check: few rows, and a smaller model if asked.

    The batch is the smallest of at least 8 rows that every mesh splits evenly, and
    whose rows a router may group.
    """
    config = copy.deepcopy(config)
    if shrink:
        config.model = config.model.shrunk()
        if isinstance(config.data, config_lib.DataConfig):
            config.data.sequence_length = min(config.data.sequence_length, 64)
    shards = math.lcm(*(m.data * m.fsdp * m.expert for m in meshes.values()))
    rows = config.train.accumulation * shards * config.model.rows_together()
    config.train.batch_size = rows * -(-_LEAST_ROWS // rows)
    return config


def _parts(config: Config, mesh: MeshConfig) -> Parts:
    config = copy.deepcopy(config)
    config.mesh = mesh
    config_lib.validate(config)
    return setup.make_parts(config, jax.devices()[: mesh.fixed_devices()])


def run_step(
    parts: Parts, state: Any, batch: Any, replay: Override | None, dtype: str
) -> tuple[Record, Any]:
    """One step of values that lie on the host, on the mesh of `parts`.

    Returns:
      The record, and the routing of every MoE layer (None where it is not known).
    """
    config, model = parts.config, parts.model
    # With several micro-batches each has a routing of its own: none is captured.
    mode = _CAPTURE if config.train.accumulation == 1 else Mode(train=True)

    def both(state, batch, replay):
        found = step.compute_gradients(
            config, model, state, batch, mode=mode, override=replay
        )
        apply = functools.partial(
            step.apply_gradients, config, model, parts.optimizer, state
        )
        new, norm = apply(found)
        nudged = apply(dataclasses.replace(found, grads=_nudged(found.grads, dtype)))
        return found, norm, new.params, nudged[0].params, new.router_state

    with jax.set_mesh(parts.mesh):
        state = jax.device_put(state, parts.shardings)
        size = config.train.batch_size
        placed = batches.put(batch, parts.mesh, size, 0)
        found, *after = jax.jit(both)(state, placed, replay)
    routing = None
    # A continuous router chooses nothing that could be replayed.
    if found.aux is not None and isinstance(found.aux.routing, Routing):
        routing = jax.device_get(found.aux.routing)
    return compare.record(found, *after, dtype), routing


def _nudged(grads: Any, dtype: str) -> Any:
    """Gradients that are apart from these by the tolerance, evenly over each array.

    One that is nothing but rounding could be any other such.
    """
    tolerance, whole = compare.TOLERANCE[dtype], optax.tree.norm(grads)

    def nudge(g):
        rounding = compare.ROUNDING * whole / math.sqrt(g.size)
        root = jnp.sqrt(jnp.mean(jnp.square(g)))
        size = jnp.where(root <= tolerance * rounding, rounding, root)
        signs = jax.random.rademacher(jax.random.key(0), g.shape, g.dtype)
        return g + (tolerance * size).astype(g.dtype) * signs

    return jax.tree.map(nudge, grads)


def check_dtype(
    config: Config, meshes: dict[str, MeshConfig], dtype: str
) -> list[Result]:
    """All meshes against one device in one precision.

    In float32 the routing of the one-device run is replayed, because a choice between
    two experts whose scores agree to the last digits is no property of the layout.
    """
    config = with_dtype(config, dtype)
    batch = rows.random_batch(config, dtype)
    one = _parts(config, MeshConfig(data=1))
    fresh = jax.device_get(setup.fresh_state(one))
    state = without_zeros(fresh)
    reference, routing = run_step(one, state, batch, None, dtype)
    replay = None
    if routing is not None and dtype != "float64":
        replay = Override(expert_tk=routing.expert_tk, valid_tk=routing.valid_tk)
    results = []
    for name, mesh in meshes.items():
        parts = _parts(config, mesh)
        found, _ = run_step(parts, state, batch, replay, dtype)
        begun = jax.device_get(setup.fresh_state(parts).params)
        results.append(
            Result(
                mesh=name,
                dtype=dtype,
                differences=[
                    _initial(begun, fresh.params),
                    *compare.differences(found, reference, dtype),
                ],
                dropped=(found.dropped, reference.dropped),
                near_ties=found.near_ties,
            )
        )
    return results


def without_zeros(state: TrainState) -> TrainState:
    """The state with random values for parameters that are zero throughout.

    Behind gates that begin at zero nothing else would have a gradient.
    """
    rng = np.random.default_rng(0)

    def fill(a):
        return a if np.any(a) else rng.normal(size=a.shape, scale=0.02).astype(a.dtype)

    params = jax.tree.map(fill, state.params)
    ema = None if state.ema is None else jax.tree.map(np.copy, params)
    return dataclasses.replace(state, params=params, ema=ema)


def _initial(found: Any, reference: Any) -> Difference:
    """Entries of the initial parameters that depend on the mesh."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(reference), strict=True)
    wrong = sum(int(np.sum(np.asarray(a) != np.asarray(b))) for a, b in pairs)
    return Difference(name="initial parameters", error=float(wrong), allowed=0.0)


def check(config: Config, meshes: dict[str, MeshConfig]) -> list[Result]:
    """Float32, then float64. Leaves 64-bit types enabled in this process."""
    results = check_dtype(config, meshes, "float32")
    jax.config.update("jax_enable_x64", True)
    return results + check_dtype(config, meshes, "float64")
