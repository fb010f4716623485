"""What `moe-jax bench skew` found, as text for people and as figures."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from moe_jax.bench.layer import Layer
from moe_jax.bench.oracle import TOLERANCE
from moe_jax.bench.skew import Load, Program, Row
from moe_jax.bench.timing import Times

# Widths of columns.
_OPTIONS, _NAME = 52, 14
_FAKE = (
    "times say how work is split, not how fast an accelerator is.\n"
    "What Ragged does in one operation on TPUs has slow stand-ins here."
)


def heading(layer: Layer, mesh: Mesh) -> Iterator[str]:
    """What is measured, and where."""
    sizes = " ".join(f"{axis}={n}" for axis, n in mesh.shape.items() if n > 1)
    device = mesh.devices.flat[0]
    fake = device.platform == "cpu"
    plural = "s" * (mesh.size > 1)
    kind = "fake CPU device" if fake else f"{device.device_kind!r} device"
    yield (
        f"{layer.tokens} tokens, top {layer.top_k} of {layer.num_experts} experts, "
        f"d_model {layer.d_model}, d_ff {layer.d_ff}, {layer.dtype}"
    )
    yield f"mesh {sizes or 'of one'}: {mesh.size} {kind}{plural}"
    if fake:
        yield f"They share {os.cpu_count()} CPU cores: {_FAKE}"


def programs_heading() -> str:
    return f"{'dispatch':<{_OPTIONS}}{'memory':>12}{'compiled':>12}"


def program(found: Program) -> str:
    """One dispatch; MB are 10^6 bytes."""
    nbytes = found.temporary_bytes
    memory = "unknown" if nbytes is None else f"{nbytes / 1e6:.2f} MB"
    plain = found.name == type(found.options).__name__
    options = str(found.options) if plain else found.name
    return f"{options:<{_OPTIONS}}{memory:>12}{found.compile_seconds:>10.1f} s"


MEMORY = (
    "memory: temporary, per device, forward and backward, by the compiler; no pattern "
    "changes it"
)


def rows_heading(repeats: int, dtype: str) -> Iterator[str]:
    yield (
        f"ms: forward and backward, median of {repeats} and the quartiles; error: from "
        f"the dense oracle, {TOLERANCE[dtype]:.0e} allowed"
    )
    yield (
        f"{'dispatch':<{_NAME}}{'ms':>9}{'quartiles':>18}{'rounds':>8}"
        f"{'dropped':>16}{'error':>10}"
    )


def rows(load: Load, found: Sequence[Row]) -> Iterator[str]:
    """One pattern."""
    yield (
        f"{load.pattern}: fullest expert {load.expert:.1f} x the mean, fullest shard "
        f"{load.shard:.1f} x"
    )
    for row in found:
        low, high = (f"{1e3 * q:.2f}" for q in row.times.quartiles)
        share = f" ({row.dropped_share:.1%})" if row.dropped else ""
        yield (
            f"  {row.dispatch:<{_NAME - 2}}{1e3 * row.median:>9.2f}"
            f"{f'{low}-{high}':>18}{row.rounds:>8}{f'{row.dropped}{share}':>16}"
            f"{row.error:>10.1e}  {f'WRONG: {row.problem}' if row.problem else 'equal'}"
        )


def worst(found: Sequence[Row]) -> Iterator[str]:
    """What each dispatch comes to at worst, over the patterns."""
    yield (
        f"{'at worst':<{_NAME}}{'ms':>9}  {'under':<16}{'rounds':>8}{'dropped':>16}"
        f"{'error':>10}"
    )
    for name in dict.fromkeys(row.dispatch for row in found):
        of_it = [row for row in found if row.dispatch == name]
        slowest = max(of_it, key=lambda row: row.median)
        share = max(row.dropped_share for row in of_it)
        yield (
            f"{name:<{_NAME}}{1e3 * slowest.median:>9.2f}  {slowest.pattern:<16}"
            f"{max(row.rounds for row in of_it):>8}{share:>16.1%}"
            f"{np.max([row.error for row in of_it]):>10.1e}"
        )


def summary(found: Sequence[Row]) -> str:
    wrong = [row for row in found if row.problem]
    names = ", ".join(dict.fromkeys(row.dispatch for row in wrong))
    if wrong:
        return f"FAILED: {len(wrong)} of {len(found)}, of {names}"
    return f"passed: all {len(found)} equal the oracle on what they served"


def figures(
    layer: Layer, mesh: Mesh, programs: Sequence[Program], found: Sequence[Row]
) -> dict[str, Any]:
    """All of it as JSON data; times in seconds, memory in bytes a device."""
    device = mesh.devices.flat[0]
    return {
        "layer": dataclasses.asdict(layer),
        "mesh": dict(mesh.shape),
        "platform": device.platform,
        "device_kind": device.device_kind,
        "dispatches": [
            {
                "name": p.name,
                "options": str(p.options),
                "temporary_bytes": p.temporary_bytes,
                "compile_seconds": p.compile_seconds,
            }
            for p in programs
        ],
        "rows": [
            dataclasses.asdict(row) | {"median_seconds": row.median, "error": row.error}
            for row in found
        ],
    }


def speed_heading() -> str:
    return (
        f"{'dispatch':<{_NAME}}{'ms, median (quartiles)':>28}{'useful GFLOP/s':>16}"
        f"{'of dense':>10}"
    )


def speed(program: Program, times: Times, flops: float, dense_rate: float) -> str:
    """One dispatch; rates are of all devices together."""
    rate = flops / times.median
    return (
        f"{program.name:<{_NAME}}{times.shown():>28}{rate / 1e9:>16.1f}"
        f"{rate / dense_rate:>10.1%}"
    )


def dense_speed(times: Times, flops: float, devices: int) -> str:
    """The dense matmul that the others are held against."""
    alone = f"{flops / times.median / 1e9:>16.1f}"
    over = f", {devices} times that is 100%" if devices > 1 else ""
    return f"{'dense matmul':<{_NAME}}{times.shown():>28}{alone}  on one device{over}"
