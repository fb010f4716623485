"""Mixture of Tokens (Antoniak et al. 2023): one slot an expert and group."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from moe_jax import config
from moe_jax.errors import UserError
from moe_jax.moe.routing import Array, Groups, Mixing, Mode, Override, Tokens
from moe_jax.moe.selectors import common


@config.node
class MixtureOfTokens(config.SelectorConfig):
    """Each expert serves one mixture of the tokens of a group.

    Attributes:
      group_size: tokens in a group, g; it divides the rows of every batch (or S).
      across: "rows" groups the same position of g neighbouring rows, which looks at no
        later position; "positions" groups g neighbouring positions of a row.
      temperature: of the softmax over the group.
      emit: what weighs an expert's output for a token: the same weight ("merge"), or a
        softmax over the experts ("softmax").
    """

    group_size: int = 32
    across: str = "rows"
    temperature: float = 1.0
    emit: str = "merge"

    def experts_per_token(self, num_experts, sequence_length=0):
        return num_experts / (self.group_size if sequence_length else 1)

    def rows_together(self):
        return self.group_size if self.across == "rows" else 1

    def problems(self, path, root):
        yield from common.least_problems(self, path, group_size=1)
        if self.temperature <= 0:
            yield f"{path}.temperature={self.temperature}: must be positive"
        if self.emit not in ("merge", "softmax"):
            yield f"{path}.emit={self.emit!r}: must be 'merge' or 'softmax'"
        if self.across not in ("rows", "positions"):
            yield f"{path}.across={self.across!r}: must be 'rows' or 'positions'"
        yield from self._batch_problems(path, root)

    def _batch_problems(self, path, root):
        mesh, train = root.mesh, root.train
        length = root.positions() // max(1, mesh.context)
        sizes = {"data.sequence_length / context": length}
        if self.across == "rows":
            shards = max(1, mesh.data) * mesh.fsdp * mesh.expert
            rows = train.batch_size // max(1, train.accumulation * shards)
            name = "train.batch_size / accumulation / (data * fsdp * expert)"
            sizes = {name: rows, "eval.samples": root.eval.samples}
        for name, size in sizes.items():
            if self.group_size >= 1 and size % self.group_size:
                yield (
                    f"{path}.group_size={self.group_size} does not divide "
                    f"config.{name} = {size}: a group stays on one shard"
                )


def _groups(options: MixtureOfTokens, tokens: Tokens) -> Groups:
    rows, positions = tokens.batch_shape
    size = options.group_size
    across = rows if options.across == "rows" else positions
    if across % size:
        raise UserError(
            f"MixtureOfTokens groups {size} {options.across}, but there are {across}"
        )
    block = (size, 1) if options.across == "rows" else (1, size)
    return Groups(tokens.batch_shape, *block)


def select(
    options: MixtureOfTokens,
    logits_te: Array,
    tokens: Tokens,
    router_state: Mapping[str, Array],
    mode: Mode,
    override: Override | None,
    key: Array | None,
) -> Mixing:
    """Merge weights: a softmax over the group's tokens, one slot an expert.

    Of an override, pruned experts are honoured, and shifted logits with
    emit="softmax": within a group they shift all tokens alike.

    Raises:
      UserError: the group size does not divide the batch.
    """
    common.refuse_choices(override, "MixtureOfTokens")
    if options.emit == "merge":
        reason = "all tokens of a group shift alike"
        common.refuse(override, "MixtureOfTokens", logit_shift=reason)
    groups = _groups(options, tokens)
    scaled_te = logits_te / options.temperature
    merge_te = common.softmax_over_group(scaled_te, tokens.valid, groups)
    emit_te = merge_te
    if options.emit == "softmax":
        emit_te = jax.nn.softmax(common.adjusted(logits_te, override), axis=-1)
    elif override is not None and override.expert_mask is not None:
        emit_te = jnp.where(override.expert_mask, emit_te, 0)
    return Mixing(
        merge_tep=merge_te[..., None],
        emit_tep=jnp.where(tokens.valid[:, None], emit_te, 0)[..., None],
        logits_tep=logits_te[..., None],
        valid_t=tokens.valid,
        num_experts=logits_te.shape[-1],
        groups=groups,
    )
