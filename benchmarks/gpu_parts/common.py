"""Sizes, times, and how far results are from those that they should be."""

import dataclasses
import statistics
import time

import numpy as np

WARM_UP, RUNS, CALLS = 3, 10, 5
# Largest error over the largest value.
TOLERANCE = {"bfloat16": 1e-2, "float32": 1e-5}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured: T tokens, E experts of which K serve one, D, F; a model."""

    tokens: int = 16384
    num_experts: int = 64
    top_k: int = 8
    d_model: int = 2048
    d_ff: int = 1024
    dense: int = 8192
    num_layers: int = 16
    vocab_size: int = 50304
    rows: int = 8
    length: int = 4096

    @property
    def assignments(self) -> int:
        return self.tokens * self.top_k

    @property
    def product_flops(self) -> float:
        """Of one matrix of every expert, on the rows of the tokens that it serves."""
        return 2.0 * self.assignments * self.d_model * self.d_ff

    @property
    def layer_flops(self) -> float:
        """Of the experts of a layer: three matrices, forward and twice backward."""
        return 9 * self.product_flops


TINY = Sizes(
    tokens=256,
    num_experts=4,
    top_k=2,
    d_model=64,
    d_ff=32,
    dense=64,
    num_layers=2,
    vocab_size=512,
    rows=2,
    length=128,
)


def timed(call, wait, calls: int = CALLS) -> dict[str, float]:
    """Milliseconds of one call: median and quartiles of `RUNS` times `calls`."""
    for _ in range(WARM_UP):
        wait(call())
    found = []
    for _ in range(RUNS):
        begin = time.perf_counter()
        for _ in range(calls):
            result = call()
        wait(result)
        found.append(1e3 * (time.perf_counter() - begin) / calls)
    low, middle, high = statistics.quantiles(found, n=4)
    return {"ms": middle, "ms_low": low, "ms_high": high}


def speed(flops: float, ms: float, dense_rate: float) -> dict[str, float]:
    """TFLOP/s, and the share of the rate of a dense product."""
    rate = flops / (ms / 1e3)
    return {"tflops": rate / 1e12, "of_dense": rate / dense_rate}


def drawn(total: int, groups: int) -> np.ndarray:
    """Rows of groups in a uniform routing."""
    rng = np.random.default_rng(0)
    return rng.multinomial(total, np.full(groups, 1 / groups)).astype(np.int32)


def error(found, want) -> float:
    """The largest difference over the largest value; NaN where there is one."""
    found, largest = np.asarray(found, np.float64), np.max(np.abs(want), initial=0.0)
    return float(np.max(np.abs(found - want), initial=0.0) / max(largest, 1e-30))
