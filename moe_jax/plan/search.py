"""Finds a good layout: an estimate of every legal one, a compilation of the best few.

The analytic model ranks all candidates in seconds. Half of the compilations go to its
best, no more than two on one mesh so that one error of the model does not take them
all; the other half to neighbours of the best that was compiled. The config's own
layout is always among them. Compilations stop before machine code
(`program.compile_program`), so that twenty of them take minutes.
"""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterator, Sequence

from moe_jax.config import Config
from moe_jax.errors import UserError
from moe_jax.plan import analytic, worker
from moe_jax.plan.analytic import Estimate
from moe_jax.plan.candidates import Candidate, Settings, candidates, settings_of
from moe_jax.plan.topology import Topology
from moe_jax.plan.worker import Plan, Request

GB = 1e9
# A layout whose estimated peak is beyond this share of the memory is not compiled:
# the estimate was up to 30 % too high where it was compared.
FIT_MARGIN = 1.3
_PER_MESH = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """A candidate and what is known of it.

    Attributes:
      candidate: the layout.
      estimate: of the analytic model.
      plan: of its compilation, as `report.Plan.to_json` gives it; None: not compiled.
    """

    candidate: Candidate
    estimate: Estimate
    plan: Plan | None = None

    @property
    def compiles(self) -> bool:
        return self.plan is not None and "error" not in self.plan

    @property
    def fits(self) -> bool:
        """Compiled, and in memory."""
        return self.compiles and self.plan["fits"]

    @property
    def rank(self) -> tuple[bool, float]:
        """Smaller is better: what fits, then by the compiled step."""
        return not self.fits, self.plan["step_seconds"] if self.fits else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What a search found.

    Attributes:
      topology: that was searched for.
      capacity: bytes of memory a device.
      points: all legal layouts, compiled ones first, best first.
      given: the config's own layout; None where it is not legal there.
    """

    topology: Topology
    capacity: float
    points: tuple[Point, ...]
    given: Point | None

    @property
    def compiled(self) -> tuple[Point, ...]:
        return tuple(p for p in self.points if p.plan is not None)

    @property
    def winner(self) -> Point | None:
        """The fastest that fits."""
        return self.points[0] if self.points and self.points[0].fits else None

    @property
    def neighbours(self) -> tuple[Point, ...]:
        """Layouts that differ from the winner in one setting, best first."""
        if self.winner is None:
            return ()
        best = self.winner.candidate.settings
        return tuple(p for p in self.points if p.candidate.settings.is_neighbour(best))


def first_choice(points: Sequence[Point], count: int) -> list[Point]:
    """The best `count` by estimate, at most two on a mesh."""
    taken: list[Point] = []
    per_mesh: dict[tuple[int, ...], int] = {}
    for point in sorted(points, key=lambda p: p.estimate.step_seconds):
        mesh = point.candidate.settings.mesh
        if len(taken) < count and per_mesh.get(mesh, 0) < _PER_MESH:
            per_mesh[mesh] = per_mesh.get(mesh, 0) + 1
            taken.append(point)
    return taken


def next_choice(points: Sequence[Point], count: int) -> list[Point]:
    """After the first: neighbours of the best compiled; where none fits, the smallest.

    What remains goes to the best by estimate.
    """
    left = [p for p in points if p.plan is None]
    best = min((p for p in points if p.fits), key=lambda p: p.rank, default=None)
    if best is None:
        return sorted(left, key=lambda p: p.estimate.peak_bytes)[:count]
    settings = best.candidate.settings
    far = lambda p: not p.candidate.settings.is_neighbour(settings)
    return sorted(left, key=lambda p: (far(p), p.estimate.step_seconds))[:count]


def search(
    config: Config,
    topology: Topology,
    *,
    compile_best: int = 8,
    workers: int = 2,
    cache: str = worker.CACHE,
    compile_one: worker.Compile = worker.compile_apart,
    on_plan: Callable[[Point], None] = lambda point: None,
) -> Result:
    """Ranks the layouts of a config on a topology.

    Args:
      config: the experiment; its global batch and model stay as they are.
      topology: of TPUs.
      compile_best: layouts to compile, beside the config's own.
      workers: compilations at a time; each takes a core and some gigabytes.
      cache: folder of plans made before; "" keeps none.
      compile_one: makes a plan that the cache does not have.
      on_plan: told of each layout that was compiled, from several threads.

    Raises:
      UserError: no legal layout, or fake devices, which have no step time.
    """
    if topology.chip is None:
        raise UserError(
            f"--topology={topology.name}: --search compares modelled times, and fake "
            "devices have none; name a TPU topology"
        )
    _check(config)
    own = settings_of(config, len(topology.devices))
    points = _estimated(config, topology)

    def compiled(point: Point) -> Point:
        config = point.candidate.config
        request = Request.of(config, topology.name, topology.slices, quick=True)
        plan = worker.plan(request, cache, compile_one)
        point = dataclasses.replace(point, plan=plan)
        on_plan(point)
        return point

    def compile_points(chosen: list[Point]) -> None:
        with concurrent.futures.ThreadPoolExecutor(max(1, workers)) as pool:
            for point in pool.map(compiled, chosen):
                points[point.candidate.settings] = point

    limit = FIT_MARGIN * topology.chip.hbm_bytes
    small = lambda: [p for p in points.values() if p.estimate.peak_bytes <= limit]
    first = first_choice(small(), (compile_best + 1) // 2)
    given = points.get(own)
    if given is not None and given not in first:
        first.append(given)
    compile_points(first)
    compile_points(next_choice(small() or list(points.values()), compile_best // 2))
    return _result(topology, points, own)


def _check(config: Config) -> None:
    """Raises for what the formulas do not know."""
    if "," in config.model.remat or config.model.uses_host():
        raise UserError(
            f"--config.model.remat={config.model.remat} is not ranked by --search, "
            "whose formulas take all blocks for alike and know no memory but the "
            "device's; leave one policy, without 'host:'"
        )
    if config.train.offload_optimizer:
        raise UserError(
            "--config.train.offload_optimizer is not ranked by --search, whose "
            "formulas know no memory but the device's; leave it out"
        )


def _estimated(config: Config, topology: Topology) -> dict[Settings, Point]:
    chip, slices = topology.chip, topology.slices
    return {
        one.settings: Point(
            candidate=one,
            estimate=analytic.estimate(one.config, chip, one.sizes, slices),
        )
        for one in candidates(config, len(topology.devices), slices)
    }


def _result(topology: Topology, points: dict[Settings, Point], own: Settings) -> Result:
    compiled = sorted((p for p in points.values() if p.plan), key=lambda p: p.rank)
    others = sorted(
        (p for p in points.values() if not p.plan),
        key=lambda p: p.estimate.step_seconds,
    )
    return Result(
        topology=topology,
        capacity=topology.chip.hbm_bytes,
        points=(*compiled, *others),
        given=points.get(own),
    )


def _more(new: dict[str, float], old: dict[str, float], scale: float, unit: str) -> str:
    """The two parts that grew the most, as `weight gathers +1.9 ms`."""
    grown = {name: size - old.get(name, 0.0) for name, size in new.items()}
    worst = sorted(grown, key=lambda name: -grown[name])[:2]
    floor = 0.05 * sum(max(0.0, size) for size in grown.values())
    shown = [n for n in worst if grown[n] > floor and grown[n] * scale >= 0.01]
    return ", ".join(f"{n} {grown[n] * scale:+.2f} {unit}" for n in shown)


def reason(point: Point, best: Point, capacity: float) -> str:
    """Why a layout loses against the best, with figures."""
    new, old = point.estimate, best.estimate
    by_memory = _more(new.memory, old.memory, 1 / GB, "GB")
    by_time = _more(new.seconds, old.seconds, 1e3, "ms")
    if point.plan is not None and "error" in point.plan:
        return f"was not compiled: {point.plan['error']}"
    if point.compiles and not point.fits:
        over = point.plan["allocated_bytes"] - capacity
        return f"does not fit, {over / GB:.2f} GB too much: {by_memory}"
    if point.fits:
        slower = (point.plan["step_seconds"] - best.plan["step_seconds"]) * 1e3
        return f"{slower:+.2f} ms compiled: {by_time or _compiled(point, best)}"
    if new.peak_bytes > FIT_MARGIN * capacity:
        over = (new.peak_bytes - capacity) / GB
        return f"would not fit, {over:.2f} GB too much: {by_memory}"
    slower = (new.step_seconds - old.step_seconds) * 1e3
    if slower <= 0:
        return f"{slower:+.2f} ms estimated, but not compiled"
    return f"{slower:+.2f} ms estimated: {by_time or 'many small parts'}"


def _compiled(point: Point, best: Point) -> str:
    """What the compiled programs differ in, where the model sees no reason."""
    facts = (
        ("exposed_seconds", 1e3, "ms exposed collectives"),
        ("hbm_bytes", 1e-9, "GB of HBM traffic"),
        ("executed_flops", 1e-12, "TFLOP executed"),
    )
    grown = [
        f"{(point.plan[name] - best.plan[name]) * scale:+.2f} {unit}"
        for name, scale, unit in facts
        if point.plan[name] > 1.01 * best.plan[name]
    ]
    return ", ".join(grown) or "the schedule"


_HEAD = (
    "    step, ms           peak, GB\ncompiled estimated  compiled estimated  layout"
)


def _row(point: Point) -> str:
    estimate, plan = point.estimate, point.plan
    step = peak = "-"
    if point.compiles:
        step = f"{plan['step_seconds'] * 1e3:.2f}" if plan["fits"] else "no fit"
        if plan["peak_bytes"]:
            peak = f"{plan['peak_bytes'] / GB:.2f}"
    elif plan is not None:
        step = "failed"
    bound = f"  (bound by {plan['bound']})" if point.fits else ""
    return (
        f"{step:>8} {estimate.step_seconds * 1e3:>9.2f}  {peak:>8} "
        f"{estimate.peak_bytes / GB:>9.2f}  {point.candidate.settings}{bound}"
    )


def lines(result: Result, most_neighbours: int = 12) -> Iterator[str]:
    """The result for people: table, what to paste, why the neighbours lose."""
    limit = FIT_MARGIN * result.capacity
    small = sum(p.estimate.peak_bytes <= limit for p in result.points)
    yield (
        f"{len(result.points)} layouts are legal on {result.topology}; {small} of them "
        f"may fit in {result.capacity / GB:.2f} GB; {len(result.compiled)} compiled"
    )
    yield from _HEAD.split("\n")
    for point in result.compiled:
        own = result.given is not None and (
            point.candidate.settings == result.given.candidate.settings
        )
        yield _row(point) + ("  <- this config" if own else "")
    best = result.winner
    if best is None:
        smallest = min(result.points, key=lambda p: p.estimate.peak_bytes)
        yield (
            "None of them fits; the smallest by estimate needs "
            f"{smallest.estimate.peak_bytes / GB:.2f} GB: "
            f"{smallest.candidate.settings}"
        )
        return
    yield "The best, as flags:"
    yield "  " + (" ".join(best.candidate.flags) or "none: it is this config's own")
    if best.candidate.python:
        yield "and in the config file:"
        yield from (f"  {line}" for line in best.candidate.python)
    yield "Its neighbours, one setting away:"
    for point in result.neighbours[:most_neighbours]:
        why = reason(point, best, result.capacity)
        yield f"  {point.candidate.settings}: {why}"
