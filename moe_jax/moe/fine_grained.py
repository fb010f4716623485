"""Fine-grained experts (DeepSeekMoE, Dai et al. 2024, section 3.1)."""

import copy

from moe_jax.errors import UserError
from moe_jax.moe.layer import MoE


def fine_grained(options: MoE, parts: int) -> MoE:
    """Cuts each expert into `parts` of a `parts`-th of its width, all else equal.

    There are then `parts` times as many experts, and a token takes `parts` times as
    many: the experts' weights and work stay what they are, but
    `C(parts * E, parts * K)` combinations of experts are possible in place of
    `C(E, K)`.

    Args:
      options: not changed.
      parts: m of the paper; divides the experts' `d_ff`.

    Raises:
      UserError: the width cannot be cut so, or the selector has no number of experts
        that could be multiplied.
    """
    width = options.experts.d_ff
    if parts < 1 or width % parts:
        raise UserError(f"experts of width d_ff={width} cannot be cut in {parts} parts")
    cut = copy.deepcopy(options)
    cut.num_experts *= parts
    cut.experts.d_ff = width // parts
    name = next(
        (n for n in ("top_k", "capacity_factor") if hasattr(cut.selector, n)), None
    )
    if name is None:
        raise UserError(
            f"{type(cut.selector).__name__} has no number of experts a token that "
            "could be multiplied: set num_experts, d_ff and the selector by hand"
        )
    setattr(cut.selector, name, getattr(cut.selector, name) * parts)
    return cut
