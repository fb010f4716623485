"""From a config to the parts of a run: mesh, model, optimizer, state."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from moe_jax import models
from moe_jax.config import Config
from moe_jax.errors import UserError
from moe_jax.models.base import Model, RouterState
from moe_jax.nn.module import Params
from moe_jax.parallel import batches, compiler, host, mesh, rules
from moe_jax.train import optimizers, schedules, state, step
from moe_jax.train.state import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """What a run is made of; code and facts, no arrays.

    Attributes:
      config: the experiment.
      mesh: over the devices.
      model: code of the model.
      schedule: step -> factor of the learning rate.
      optimizer: of optax.
      abstract: shapes, types and shardings of the train state.
    """

    config: Config
    mesh: Mesh
    model: Model
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    abstract: TrainState

    @property
    def shardings(self) -> TrainState:
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract)

    @property
    def experts(self) -> dict[str, int]:
        """Which dimension of a leaf of the state counts experts, by its path name."""
        return state.expert_dimensions(self.abstract, self.model.axes)

    @property
    def eval_batch_size(self) -> int:
        """Rows of an evaluation batch: one micro-batch."""
        return self.config.train.batch_size // self.config.train.accumulation


def use_compilation_cache(config: Config) -> None:
    """Keeps compiled programs on disk, so that a second start is quick."""
    if config.train.compilation_cache:
        folder = os.path.expanduser(config.train.compilation_cache)
        jax.config.update("jax_compilation_cache_dir", folder)


def make_parts(config: Config, devices: list | None = None) -> Parts:
    """Builds the parts over `devices` (default: all). Allocates nothing.

    Raises:
      UserError: the mesh does not fit the devices, or the batch the mesh.
    """
    device_mesh = mesh.make_mesh(config.mesh, devices)
    _check_batch(config, device_mesh)
    for option in _on_host(config):
        host.check(device_mesh.devices.flat, option)
    model = models.build(config.model)
    schedule = schedules.make_schedule(config.schedule, config.train.steps)
    # In turns, no parameter meets the others' gradients.
    clips = not optimizers.in_turns(config)
    optimizer = optimizers.make_optimizer(config.optimizer, schedule, clips=clips)
    with jax.set_mesh(device_mesh):
        abstract = state.abstract_state(config, model, optimizer, device_mesh)
    optimizers.check(config.optimizer, abstract.params)
    return Parts(
        config=config,
        mesh=device_mesh,
        model=model,
        schedule=schedule,
        optimizer=optimizer,
        abstract=abstract,
    )


def _on_host(config: Config) -> list[str]:
    """Options that use the memory of the host."""
    found = []
    if config.train.offload_optimizer:
        found.append("--config.train.offload_optimizer")
    if config.model.uses_host():
        found.append(f"--config.model.remat={config.model.remat}")
    return found


def _check_batch(config: Config, device_mesh: Mesh) -> None:
    # `validate` does not know how many devices data=-1 stands for.
    micro = config.train.batch_size // config.train.accumulation
    shards = rules.size(device_mesh, "batch")
    if micro % shards:
        raise UserError(
            f"--config.train.batch_size={config.train.batch_size} / accumulation="
            f"{config.train.accumulation} = {micro} rows cannot be split over "
            f"{shards} shards (data * fsdp * expert on {device_mesh.size} devices); "
            f"set batch_size to a multiple of {shards * config.train.accumulation}"
        )


def fresh_state(parts: Parts) -> TrainState:
    """Initial values, made where they will lie; the same on every mesh."""
    make = lambda key: state.init_state(parts.config, parts.model, parts.optimizer, key)
    with jax.set_mesh(parts.mesh):
        key = jax.random.key(parts.config.seed)
        return jax.jit(make, out_shardings=parts.shardings)(key)


def fresh_router_state(parts: Parts) -> RouterState:
    """What routers know before the first step."""
    make, where = parts.model.init_router_state, parts.shardings.router_state
    return jax.jit(make, out_shardings=where)()


def state_from(parts: Parts, params: Params, router_state: RouterState) -> TrainState:
    """The state before the first step, with parameters from elsewhere.

    Args:
      parts: of the run.
      params: all of them, where they shall lie; they are used up.
      router_state: of the model.
    """
    trainable, frozen = optimizers.split(parts.config.optimizer, params)
    shardings = parts.shardings
    with jax.set_mesh(parts.mesh):
        opt_state = jax.jit(parts.optimizer.init, out_shardings=shardings.opt_state)(
            trainable
        )
        ema = None
        if parts.config.train.ema_decay:  # A copy: the step donates both.
            ema = jax.tree.map(jnp.copy, trainable)
        return TrainState(
            step=jax.device_put(jnp.zeros((), jnp.int32), shardings.step),
            params=trainable,
            frozen=frozen,
            opt_state=opt_state,
            router_state=jax.device_put(router_state, shardings.router_state),
            ema=ema,
        )


def trace_step(parts: Parts) -> jax.stages.Traced:
    """The train step for the parts' shapes, `(state, batch)`, traced."""
    config = parts.config
    kind = parts.mesh.devices.flat[0].device_kind
    options = compiler.options(kind, config.train.xla_options)
    jitted = step.make_step(
        config, parts.model, parts.optimizer, parts.schedule, parts.shardings, options
    )
    rows = config.model.row_shapes(config.data)
    batch = batches.abstract(parts.mesh, config.train.batch_size, rows)
    with jax.set_mesh(parts.mesh):
        return jitted.trace(parts.abstract, batch)


def lower_step(parts: Parts) -> jax.stages.Lowered:
    """The same, lowered and not yet compiled."""
    with jax.set_mesh(parts.mesh):
        return trace_step(parts).lower()


def compile_step(parts: Parts) -> jax.stages.Compiled:
    """The train step, compiled for the parts' shapes: `(state, batch)`."""
    with jax.set_mesh(parts.mesh):
        return lower_step(parts).compile()
