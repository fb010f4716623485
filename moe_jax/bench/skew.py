"""The dispatches under one routing after another, each held to the oracle."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.bench import layer as layer_lib
from moe_jax.bench import oracle as oracle_lib
from moe_jax.bench import patterns
from moe_jax.bench.layer import Layer
from moe_jax.bench.timing import Times, in_turn
from moe_jax.config import DispatchConfig, MeshConfig
from moe_jax.moe.dispatch import MAY_DROP
from moe_jax.moe.dispatch.auto import Auto, choose
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.parallel import rules
from moe_jax.parallel.mesh import platform


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A dispatch compiled for a mesh, forward and backward; the routing is an input.

    Attributes:
      name: the class's; of `Auto` also what it chose.
      options: of the dispatch.
      run: `(weights, x, weight, grad, expert, valid) -> results, statistics`.
      temporary_bytes: of memory a device beside inputs and outputs, as the compiler
        counts; None where it does not.
      compile_seconds: of tracing and compiling.
    """

    name: str
    options: DispatchConfig
    run: Callable[..., Any]
    temporary_bytes: int | None
    compile_seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One dispatch under one pattern.

    Attributes:
      pattern: its name.
      dispatch: its name.
      seconds: of each repeat, forward and backward.
      rounds: of the worst shard.
      assignments: choices that were to be served.
      dropped: choices that no expert served.
      capacity: rows that a bucket holds in one round.
      peak_fill: rows of the fullest bucket.
      errors: distance from the oracle by result; see `oracle.errors`.
      problem: what is wrong; "" where the results are those of the oracle.
    """

    pattern: str
    dispatch: str
    seconds: tuple[float, ...]
    rounds: int
    assignments: int
    dropped: int
    capacity: int
    peak_fill: int
    errors: dict[str, float]
    problem: str

    @property
    def error(self) -> float:
        """The largest of the errors."""
        return float(np.max(list(self.errors.values())))

    @property
    def dropped_share(self) -> float:
        return self.dropped / max(1, self.assignments)

    @property
    def times(self) -> Times:
        return Times(self.seconds)

    @property
    def median(self) -> float:
        return self.times.median


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """What a pattern asks for.

    Attributes:
      pattern: its name.
      expert: choices of the fullest expert over the mean of all.
      shard: the same of the shards that hold the experts.
    """

    pattern: str
    expert: float
    shard: float


class Bench:
    """A layer on a mesh: compiles dispatches, measures them, compares them."""

    def __init__(
        self, layer: Layer, mesh: MeshConfig, devices: Sequence[Any], seed: int = 0
    ):
        self.layer = layer
        self.mesh = mesh_lib.make_mesh(mesh, list(devices))
        self._seed = seed
        self._sizes = patterns.Sizes(
            tokens=layer.tokens,
            top_k=layer.top_k,
            num_experts=layer.num_experts,
            token_shards=layer_lib.token_shards(mesh),
            expert_shards=layer_lib.expert_shards(mesh),
        )
        inputs = layer_lib.draw(layer, rules.size(self.mesh, "batch"), seed)
        self._inputs = inputs
        self._batch_shape = inputs.x.shape[:2]
        tokens = rules.sharding(self.mesh, ("batch", "sequence", None))
        of_weights = rules.tree_shardings(self.mesh, layer_lib.experts(layer).axes)
        self._shardings = (of_weights, tokens, tokens, tokens, tokens, tokens)
        floats = (inputs.weights, inputs.x, inputs.weight, inputs.grad)
        with self._setting():
            self._floats = jax.device_put(floats, self._shardings[:4])

    @contextlib.contextmanager
    def _setting(self):
        """The mesh and the precision: `dtype` is what is computed in."""
        double = jax.enable_x64(self.layer.dtype == "float64")
        # Accelerators round float32 factors to fewer bits unless they are told not to.
        precision = None if self.layer.dtype == "bfloat16" else "highest"
        full = jax.default_matmul_precision(precision)
        with double, full, jax.set_mesh(self.mesh):
            yield

    @functools.cached_property
    def _oracle(self) -> oracle_lib.Oracle:
        return oracle_lib.Oracle(self.layer, self._inputs)

    def compile(self, options: DispatchConfig) -> Program:
        """Compiles a dispatch."""
        begin = time.perf_counter()
        with self._setting():
            jitted = jax.jit(
                layer_lib.forward_and_backward(self.layer, options),
                in_shardings=self._shardings,
            )
            expert_tk, valid_tk = patterns.make("balanced", self._sizes)
            compiled = jitted.lower(*self._arguments(expert_tk, valid_tk)).compile()
            name = self._name(options)
        memory = compiled.memory_analysis()
        return Program(
            name=name,
            options=options,
            run=compiled,
            temporary_bytes=getattr(memory, "temp_size_in_bytes", None),
            compile_seconds=time.perf_counter() - begin,
        )

    def _name(self, options: DispatchConfig) -> str:
        name = type(options).__name__
        if not isinstance(options, Auto):
            return name
        sizes = self._sizes
        chosen = choose(
            platform(),
            sizes.expert_shards,
            sizes.tokens // sizes.token_shards,
            float(sizes.top_k),
            sizes.num_experts,
        )
        return f"{name}: {type(chosen).__name__}"

    def _arguments(self, expert_tk: np.ndarray, valid_tk: np.ndarray) -> tuple:
        shape = (*self._batch_shape, self.layer.top_k)
        choices = (expert_tk.reshape(shape), valid_tk.reshape(shape))
        return (*self._floats, *jax.device_put(choices, self._shardings[4:]))

    def load(self, pattern: str) -> Load:
        """How uneven a pattern is."""
        expert_tk, valid_tk = patterns.make(pattern, self._sizes, self._seed)
        load_e = patterns.loads(expert_tk, valid_tk, self.layer.num_experts)
        load_n = load_e.reshape(self._sizes.expert_shards, -1).sum(axis=1)
        over = lambda a: float(a.max() / a.mean()) if a.any() else 0.0
        return Load(pattern=pattern, expert=over(load_e), shard=over(load_n))

    def measure(
        self, pattern: str, programs: Sequence[Program], repeats: int
    ) -> list[Row]:
        """One row a program, in their order.

        A repeat runs all programs in turn, so that a machine that slows down slows
        all; the first run of each is not timed.
        """
        choices = patterns.make(pattern, self._sizes, self._seed)
        with self._setting():
            given = self._arguments(*choices)
            found = [jax.device_get(program.run(*given)) for program in programs]
        times = self.times(pattern, programs, repeats, warm_up=0)
        want = self._oracle(*choices)
        return [
            self._row(pattern, program, taken.seconds, choices, want, *got)
            for program, taken, got in zip(programs, times, found, strict=True)
        ]

    def times(
        self,
        pattern: str,
        programs: Sequence[Program],
        repeats: int,
        warm_up: int = 1,
        beside: Callable[[], Any] | None = None,
    ) -> list[Times]:
        """Times of the programs under a pattern, in their order; last of `beside`."""
        with self._setting():
            given = self._arguments(*patterns.make(pattern, self._sizes, self._seed))
            calls = {i: lambda p=p: p.run(*given) for i, p in enumerate(programs)}
            if beside is not None:
                calls[len(calls)] = beside
            return list(in_turn(calls, repeats, warm_up).values())

    def _row(self, pattern, program, seconds, choices, want, results, stats) -> Row:
        expert_tk, valid_tk = choices
        dropped = int(stats.dropped)
        found = {name: _rows(name, value) for name, value in results.items()}
        served_tk = oracle_lib.served(
            valid_tk, found[layer_lib.COMBINE], want[layer_lib.COMBINE], dropped
        )
        if dropped and served_tk is not None:
            want = self._oracle(expert_tk, served_tk)
        errors = oracle_lib.errors(found, want)
        allowed = oracle_lib.TOLERANCE[self.layer.dtype]
        wrong = [name for name, error in errors.items() if not error <= allowed]
        if int(stats.assignments) != valid_tk.sum():
            problem = f"counts {int(stats.assignments)} choices of {valid_tk.sum()}"
        elif dropped and not isinstance(program.options, MAY_DROP):
            problem = "drops, which only those in MAY_DROP may"
        elif served_tk is None:
            problem = f"counts {dropped} drops, but serves more"
        else:
            problem = f"differs in {', '.join(wrong)}" if wrong else ""
        return Row(
            pattern=pattern,
            dispatch=program.name,
            seconds=seconds,
            rounds=int(stats.rounds),
            assignments=int(stats.assignments),
            dropped=dropped,
            capacity=int(stats.capacity),
            peak_fill=int(stats.peak_fill),
            errors=errors,
            problem=problem,
        )


def _rows(name: str, value: Any) -> np.ndarray:
    """Results of tokens, (B, S, ...), as (T, ...)."""
    value = np.asarray(value, dtype=jnp.promote_types(value.dtype, jnp.float32))
    of_tokens = name in (layer_lib.OUTPUT, layer_lib.COMBINE, f"{layer_lib.OF}x")
    return value.reshape(-1, value.shape[-1]) if of_tokens else value
