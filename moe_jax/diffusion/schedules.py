"""Noise schedules of DDPM (Ho et al. 2020), their tables, and respacing.

All of it runs once, on the host, in float64.
"""

import dataclasses
import math

import numpy as np

from moe_jax.errors import UserError


def linear_betas(steps: int) -> np.ndarray:
    """(T,): from 1e-4 to 0.02 for 1000 steps, scaled by 1000 / T for others."""
    return np.linspace(0.1 / steps, 20 / steps, steps, dtype=np.float64)


def cosine_betas(steps: int) -> np.ndarray:
    """(T,): those of Nichol & Dhariwal 2021, equation 17, at most 0.999."""

    def alpha_bar(share):
        return math.cos((share + 0.008) / 1.008 * math.pi / 2) ** 2

    ratios = [alpha_bar((i + 1) / steps) / alpha_bar(i / steps) for i in range(steps)]
    return np.minimum(1 - np.array(ratios, np.float64), 0.999)


BETAS = {"linear": linear_betas, "cosine": cosine_betas}


@dataclasses.dataclass(frozen=True)
class Tables:
    """A schedule of N steps; every array is (N,) float64, entry 0 next to the data.

    Attributes:
      betas: variance added by a step.
      alpha_bar: product of 1 - beta up to the step; the image's variance is kept by it.
      alpha_bar_before: the same of the step before, 1 for the first.
      posterior_variance: beta~, of q(x before | x, x0).
      posterior_log_variance: its logarithm, the first (of 0) replaced by the second.
      posterior_x0: factor of x0 in the mean of q(x before | x, x0).
      posterior_x: factor of x.
      indices: (N,) int64, the step's index in the schedule of training, which is what
        the network is asked with.
    """

    betas: np.ndarray
    alpha_bar: np.ndarray
    alpha_bar_before: np.ndarray
    posterior_variance: np.ndarray
    posterior_log_variance: np.ndarray
    posterior_x0: np.ndarray
    posterior_x: np.ndarray
    indices: np.ndarray


def make_tables(betas: np.ndarray, indices: np.ndarray | None = None) -> Tables:
    """The tables of (N,) betas, N at least 2 (Ho et al. 2020, equations 6 and 7)."""
    alpha_bar = np.cumprod(1 - betas)
    before = np.append(1.0, alpha_bar[:-1])
    variance = betas * (1 - before) / (1 - alpha_bar)
    return Tables(
        betas=betas,
        alpha_bar=alpha_bar,
        alpha_bar_before=before,
        posterior_variance=variance,
        posterior_log_variance=np.log(np.append(variance[1], variance[1:])),
        posterior_x0=betas * np.sqrt(before) / (1 - alpha_bar),
        posterior_x=(1 - before) * np.sqrt(1 - betas) / (1 - alpha_bar),
        indices=np.arange(len(betas)) if indices is None else np.asarray(indices),
    )


def respace(tables: Tables, kept: np.ndarray) -> Tables:
    """The tables of a process that visits only the steps `kept`, ascending.

    The betas are new ones, 1 - abar / (abar of the kept step before), so that every
    kept step has the noise it had (Nichol & Dhariwal 2021, section 4).
    """
    alpha_bar = tables.alpha_bar[kept]
    betas = 1 - alpha_bar / np.append(1.0, alpha_bar[:-1])
    return make_tables(betas, tables.indices[kept])


def kept_indices(steps: int, respacing: str | int) -> np.ndarray:
    """The indices of `steps` that a respacing keeps, (n,) int64, ascending.

    Args:
      steps: of the schedule, T.
      respacing: "250" or 250: that many from 0 to T - 1, evenly, rounded half to even;
        "ddim50": the integer stride from 0 that gives exactly 50.

    Raises:
      UserError: no such respacing.
    """
    text = str(respacing)
    strided, count = text.startswith("ddim"), text.removeprefix("ddim")
    if not count.isdigit() or not 2 <= int(count) <= steps:
        raise UserError(
            f"respacing {text!r} of {steps} steps: must be a number from 2 to {steps}, "
            "or ddim and such a number"
        )
    number = int(count)
    return _strided(steps, number) if strided else _even(steps, number)


def _strided(steps: int, number: int) -> np.ndarray:
    for stride in range(1, steps):
        if len(range(0, steps, stride)) == number:
            return np.arange(0, steps, stride)
    raise UserError(
        f"respacing 'ddim{number}': no integer stride takes {number} of {steps} steps; "
        f"a divisor of {steps} has one, and '{number}' spaces them evenly"
    )


def _even(steps: int, number: int) -> np.ndarray:
    # The stride is added up, not multiplied, as in the published samplers: a half is
    # then rounded as it is there.
    stride, place, found = (steps - 1) / (number - 1), 0.0, []
    for _ in range(number):
        found.append(round(place))
        place += stride
    return np.array(found, np.int64)


def karras_indices(tables: Tables, number: int, rho: float = 7.0) -> np.ndarray:
    """The indices nearest to the grid of Karras et al. 2022, equation 5, ascending.

    Evenly spaced in (sigma / alpha)^(1 / rho), from the noise of the last index to that
    of the first.

    Raises:
      UserError: two points of the grid fall on one index.
    """
    ratio = np.sqrt((1 - tables.alpha_bar) / tables.alpha_bar)
    ends = ratio[0] ** (1 / rho), ratio[-1] ** (1 / rho)
    wanted = np.linspace(*ends, number) ** rho
    found = np.unique(np.abs(ratio[None] - wanted[:, None]).argmin(axis=1))
    if len(found) < number or number < 2:
        raise UserError(
            f"spacing 'karras' with steps={number}: its points fall on {len(found)} "
            f"of {len(ratio)} indices; take fewer steps (at least 2), or 'even'"
        )
    return found
