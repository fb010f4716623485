"""The decoder's config, its rules, and how its blocks form segments."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from moe_jax import config
from moe_jax.moe import capabilities
from moe_jax.moe.dispatch.common import EXCHANGED
from moe_jax.moe.layer import MoE
from moe_jax.nn import norms
from moe_jax.nn.attention import auto
from moe_jax.nn.attention.common import ATTENDED, PROJECTED
from moe_jax.nn.attention.splash import Splash
from moe_jax.nn.feedforward import HIDDEN
from moe_jax.parallel.collectives import GATHERED

# What a rematerialised block may keep for its backward pass, by the name in a config.
REMAT_NAMES = {
    "attention": ATTENDED,
    "projections": PROJECTED,
    "exchanges": EXCHANGED,
    "hidden": HIDDEN,
    "weights": GATHERED,
}
_PLAIN_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def remat_names(remat: str) -> frozenset[str]:
    """What is kept by name: {"attention", "hidden"} of "attention+hidden"."""
    return frozenset() if remat in _PLAIN_POLICIES else frozenset(remat.split("+"))


def remat_policy(remat: str) -> Callable[..., Any] | None:
    """The policy of `jax.checkpoint`; None: there is nothing to recompute."""
    if remat in _PLAIN_POLICIES:
        return _PLAIN_POLICIES[remat]
    names = (REMAT_NAMES[name] for name in sorted(remat_names(remat)))
    return jax.checkpoint_policies.save_only_these_names(*names)


@config.node
class Decoder(config.ModelConfig):
    """A decoder-only transformer.

    Attributes:
      vocab_size: V; at least the tokenizer's.
      num_layers: blocks.
      d_model: D.
      num_heads: query heads.
      num_kv_heads: key and value heads; 0: as many as query heads.
      head_dim: 0: d_model / num_heads.
      attention: one of `nn.attention.ATTENTIONS`.
      feed_forward: dense, or MoE in some or all blocks.
      qk_norm: RMS-normalise queries and keys per head.
      rope_theta: base of the rotary wavelengths.
      norm: of the residual stream, one of `nn.norms.NORMS`: "rms" or "layer".
      norm_eps: of all norms.
      tie_embeddings: one matrix for input and output.
      output_bias: add a vector to the logits; it begins at zero.
      logit_softcap: c of `c tanh(logit / c)`; 0: none.
      mtp: modules that predict one token further each (`models.multi_token`); what
        they cost is `objective.mtp_weight`. Generation leaves them out.
      init_std: deviation of the initial weights; the projections back to the
        residual stream get it divided by sqrt(2 * num_layers) (GPT-2).
      dtype: of the computation.
      param_dtype: of the parameters.
      remat: what the backward pass recomputes of a block. "none": nothing; "full":
        all but its input; "dots": all but products with weights; else all but what is
        named, joined by "+": "attention" (what it mixed), "projections" (queries, keys
        and values), "exchanges" (rows that crossed between experts' shards, so that
        none crosses twice), "hidden" (what feed-forwards and experts multiply up to),
        "weights" (as they were gathered).
    """

    vocab_size: int = 258
    num_layers: int = 4
    d_model: int = 256
    num_heads: int = 4
    num_kv_heads: int = 0
    head_dim: int = 0
    attention: config.AttentionConfig = dataclasses.field(default_factory=auto.Auto)
    feed_forward: config.FeedForwardConfig = dataclasses.field(default_factory=MoE)
    qk_norm: bool = False
    rope_theta: float = 10000.0
    norm: str = "rms"
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    output_bias: bool = False
    logit_softcap: float = 0.0
    mtp: int = 0
    init_std: float = 0.02
    dtype: str = "bfloat16"
    param_dtype: str = "float32"
    remat: str = "full"

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def width_per_head(self) -> int:
        return self.head_dim or self.d_model // self.num_heads

    def rows_together(self) -> int:
        """See `ModelConfig.rows_together`."""
        ff = self.feed_forward
        return ff.selector.rows_together() if isinstance(ff, MoE) else 1

    def shrunk(self) -> "Decoder":
        """A small model of the same kind: same experts, routing, ratio of heads."""
        small = copy.deepcopy(self)
        heads = min(self.num_heads, 16)
        small.vocab_size = min(self.vocab_size, 512)
        small.num_heads, small.head_dim = heads, 16
        small.num_kv_heads = max(1, heads * self.kv_heads // self.num_heads)
        small.d_model = 128
        if isinstance(self.attention, Splash):
            small.attention = auto.Auto()  # The kernel does not take short rows.
        ff, layers = small.feed_forward, 2
        if isinstance(ff, MoE):
            ff.first_dense = min(ff.first_dense, 1)
            ff.experts.d_ff, layers = 64, ff.first_dense + 2 * ff.every
            ff.shared_d_ff = 64 if ff.shared_d_ff else 0
            ff.dense_d_ff = 64 if ff.first_dense or ff.every > 1 else 0
        else:
            ff.d_ff = 64
        small.num_layers = min(self.num_layers, layers)
        return small

    def problems(self, path, root):
        least = {"vocab_size": 2, "num_layers": 1, "d_model": 1, "num_heads": 1}
        small = [n for n, size in least.items() if getattr(self, n) < size]
        for name in small:
            yield f"{path}.{name}={getattr(self, name)}: must be at least {least[name]}"
        if small or self.num_kv_heads < 0 or self.head_dim < 0:
            if not small:
                yield f"{path}: num_kv_heads and head_dim must not be negative"
            return
        if not self.head_dim and self.d_model % self.num_heads:
            yield (
                f"{path}.d_model={self.d_model} is not divisible by "
                f"{path}.num_heads={self.num_heads}; num_heads takes one of "
                f"{config.divisors(self.d_model)}, or set head_dim"
            )
        if self.width_per_head % 2:
            yield (
                f"{path}.head_dim={self.width_per_head} is odd: rotary positions turn "
                "pairs; set an even one"
            )
        if self.num_heads % self.kv_heads:
            yield (
                f"{path}.num_heads={self.num_heads} is not divisible by "
                f"{path}.num_kv_heads={self.kv_heads}; it takes one of "
                f"{config.divisors(self.num_heads)}"
            )
        if unknown := remat_names(self.remat) - set(REMAT_NAMES):
            yield (
                f"{path}.remat={self.remat!r}: {sorted(unknown)[0]!r} is not known; it "
                f"takes one of {list(_PLAIN_POLICIES)}, or some of "
                f"{list(REMAT_NAMES)} joined by '+'"
            )
        if self.norm not in norms.NORMS:
            yield f"{path}.norm={self.norm!r}: must be one of {sorted(norms.NORMS)}"
        for name in ("logit_softcap", "mtp"):
            if getattr(self, name) < 0:
                yield f"{path}.{name}={getattr(self, name)}: must not be negative"
        yield from config.dtype_problems(self, path, "dtype", "param_dtype")
        yield from self._moe_problems(path, root)
        yield from self._mesh_problems(path, root.mesh)

    def _moe_problems(self, path, root):
        options = self.feed_forward
        if not isinstance(options, MoE):
            if "exchanges" in remat_names(self.remat):
                yield (
                    f"{path}.remat={self.remat!r}: there are no experts, so nothing is "
                    "exchanged; leave 'exchanges' out, or set 'full'"
                )
            return
        reason = capabilities.not_causal(options.selector)
        predicts = root.objective is not None and root.objective.autoregressive
        if reason and predicts and not options.allow_noncausal:
            yield (
                f"{path}.feed_forward.selector={type(options.selector).__name__} in a "
                f"model that predicts the next token: {reason}, so the loss would be "
                "that of a model that sees what it predicts; choose another selector, "
                f"or set {path}.feed_forward.allow_noncausal=True"
            )
        if self.num_layers < max(0, options.first_dense) + max(1, options.every):
            yield (
                f"{path}.feed_forward.first_dense={options.first_dense} and "
                f"every={options.every} leaves no block for experts: "
                f"{path}.num_layers={self.num_layers}"
            )

    def _mesh_problems(self, path, mesh):
        wide = mesh.fsdp * mesh.expert
        for name, size, parts, axis in (
            ("d_model", self.d_model, wide, "mesh.fsdp * mesh.expert"),
            ("vocab_size", self.vocab_size, mesh.tensor, "mesh.tensor"),
            ("num_heads", self.num_heads, mesh.tensor, "mesh.tensor"),
            ("num_kv_heads", self.kv_heads, mesh.tensor, "mesh.tensor"),
        ):
            if parts > 0 and size % parts:
                yield (
                    f"{path}.{name}={size} is not divisible by config.{axis}={parts}; "
                    f"the next that is: {-(-size // parts) * parts}"
                )


@dataclasses.dataclass(frozen=True)
class Segment:
    """A run of blocks that repeats: one scan.

    Attributes:
      moe: for each block of the pattern, whether it is MoE.
      repeats: times the pattern occurs.
      first_layer: index of its first block in the model.
      first_moe: number of MoE blocks below.
    """

    moe: tuple[bool, ...]
    repeats: int
    first_layer: int
    first_moe: int


def segments_of(options: Decoder) -> tuple[Segment, ...]:
    """Cuts the blocks into runs of one repeating pattern each."""
    ff, total = options.feed_forward, options.num_layers
    if not isinstance(ff, MoE):
        return (Segment((False,), total, 0, 0),)
    repeats, rest = divmod(total - ff.first_dense, ff.every)
    pattern = (False,) * (ff.every - 1) + (True,)
    runs = [((False,), ff.first_dense), (pattern, repeats), ((False,), rest)]
    found, layer, moe_layer = [], 0, 0
    for moe, count in runs:
        if count:
            found.append(Segment(moe, count, layer, moe_layer))
            layer += len(moe) * count
            moe_layer += sum(moe) * count
    return tuple(found)
