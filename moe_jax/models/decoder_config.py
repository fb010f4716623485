"""The decoder's config, its rules, and how its blocks form segments."""

import copy
import dataclasses

from moe_jax import config
from moe_jax.models import remat
from moe_jax.models.segments import (
    Segment,
    cut,
    moe_problems,
    shrink,
    size_problems,
    turn_problems,
)
from moe_jax.moe import capabilities
from moe_jax.moe.layer import MoE
from moe_jax.nn import norms
from moe_jax.nn.attention import auto, cudnn
from moe_jax.nn.attention.common import Call
from moe_jax.nn.attention.latent import LatentAttention
from moe_jax.nn.attention.layer import QK_NORMS
from moe_jax.nn.attention.splash import Splash
from moe_jax.nn.rope import Rope


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
      qk_norm: what queries and keys are RMS-normalised over: "none", each "head", or
        the whole "projection" (OLMoE); "layer": a LayerNorm of each head.
      rope: how queries and keys turn with the position.
      window: positions that a query sees, itself included; 0: all before it.
      full_attention_every: with a window, each n-th block (the last of n) sees all
        positions before it; 0: none does.
      sinks: each head has a learned score without a value in its softmax (GPT-OSS).
      attention_bias: biases of queries, keys and values.
      attention_output_bias: a bias after the heads' output projection.
      clip_qkv: queries, keys and values are cut to [-clip_qkv, clip_qkv]; 0: not.
      attention_softcap: scores become cap * tanh(scores / cap) (Gemma 2); 0: not.
      latent: multi-head latent attention (DeepSeek-V2); None: plain heads.
      norm: of the residual stream, one of `nn.norms.NORMS`: "rms" or "layer".
      norm_eps: of all norms.
      tie_embeddings: one matrix for input and output.
      output_bias: add a vector to the logits; it begins at zero.
      logit_softcap: c of `c tanh(logit / c)`; 0: none.
      mtp: modules that predict one token further each (`models.multi_token`); their
        loss has the weight `objective.mtp_weight`. Generation leaves them out.
      init_std: deviation of the initial weights; the projections back to the
        residual stream get it divided by sqrt(2 * num_layers) (GPT-2).
      dtype: of the computation.
      param_dtype: of the parameters.
      remat: what the backward pass recomputes of a block. "none": nothing; "full":
        all but its input; "dots": all but products with weights; else all but what is
        named, joined by "+": "attention" (what it mixed), "projections" (queries, keys
        and values), "exchanges" (rows that crossed between experts' shards, so that
        none crosses twice), "hidden" (what feed-forwards and experts multiply up to),
        "weights" (as they were gathered). "host:NAME" keeps it in the memory of the
        host; there "input" may wait too, which is kept in any case. Several of these
        with commas between them are taken in turn: with "full,none" every second block
        recomputes all.
    """

    vocab_size: int = 258
    num_layers: int = 4
    d_model: int = 256
    num_heads: int = 4
    num_kv_heads: int = 0
    head_dim: int = 0
    attention: config.AttentionConfig = dataclasses.field(default_factory=auto.Auto)
    feed_forward: config.FeedForwardConfig = dataclasses.field(default_factory=MoE)
    qk_norm: str = "none"
    rope: Rope = dataclasses.field(default_factory=Rope)
    window: int = 0
    full_attention_every: int = 0
    sinks: bool = False
    attention_bias: bool = False
    attention_output_bias: bool = False
    clip_qkv: float = 0.0
    attention_softcap: float = 0.0
    latent: LatentAttention | None = None
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
        """Of queries and keys."""
        if self.latent is not None:
            return self.latent.nope_dim + self.latent.rope_dim
        return self.head_dim or self.d_model // self.num_heads

    @property
    def value_width(self) -> int:
        """Of a head's values."""
        return self.latent.value_dim if self.latent else self.width_per_head

    @property
    def rope_width(self) -> int:
        """Of what turns in a head, before `rope.fraction`."""
        return self.latent.rope_dim if self.latent else self.width_per_head

    def windows(self) -> tuple[int, ...]:
        """The window of each block; 0: all positions before."""
        every = self.full_attention_every
        full = lambda layer: every and (layer + 1) % every == 0
        return tuple(0 if full(i) else self.window for i in range(self.num_layers))

    def attention_calls(self, length: int, shards: int = 1) -> list[Call]:
        """The different calls of an attention that the blocks make.

        Args:
          length: tokens of a row.
          shards: over which a row is split.
        """
        call = lambda window: Call(
            queries=length // shards,
            keys=length,
            width=self.width_per_head,
            value_width=self.value_width,
            dtype=self.dtype,
            window=window,
            softcap=self.attention_softcap,
            sinks=self.sinks,
        )
        return [call(window) for window in sorted(set(self.windows()))]

    def row_shapes(self, data) -> dict[str, tuple[tuple[int, ...], str]]:
        """See `ModelConfig.row_shapes`."""
        length = (data.sequence_length,)
        names = ("tokens", "targets", "positions", "segments")
        ids = {name: (length, "int32") for name in names}
        return ids | {"weights": (length, "float32")}

    def rows_together(self) -> int:
        """See `ModelConfig.rows_together`."""
        ff = self.feed_forward
        return ff.selector.rows_together() if isinstance(ff, MoE) else 1

    def uses_host(self) -> bool:
        """See `ModelConfig.uses_host`."""
        return remat.uses_host(self.remat)

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
        if self.latent is not None:
            rank = 32 if self.latent.query_rank else 0
            small.num_kv_heads = small.head_dim = 0
            small.latent = LatentAttention(
                query_rank=rank, kv_rank=32, nope_dim=16, rope_dim=8, value_dim=16
            )
        small.rope = self.rope.shrunk(small.rope_width)
        small.window = min(self.window, 16)
        layers = shrink(small.feed_forward)
        layers = max(layers, small.full_attention_every)  # Each kind is there.
        small.num_layers = min(self.num_layers, layers)
        return small

    def problems(self, path, root):
        least = dict.fromkeys(("num_layers", "d_model", "num_heads"), 1)
        least |= {"vocab_size": 2, "num_kv_heads": 0, "head_dim": 0}
        if sizes := list(size_problems(self, path, **least)):
            yield from sizes
            return
        if not self.latent and not self.head_dim and self.d_model % self.num_heads:
            yield (
                f"{path}.d_model={self.d_model} is not divisible by "
                f"{path}.num_heads={self.num_heads}; num_heads takes one of "
                f"{config.divisors(self.d_model)}, or set head_dim"
            )
        if self.num_heads % self.kv_heads:
            yield (
                f"{path}.num_heads={self.num_heads} is not divisible by "
                f"{path}.num_kv_heads={self.kv_heads}; it takes one of "
                f"{config.divisors(self.num_heads)}"
            )
        yield from remat.problems(self, path, root)
        if self.norm not in norms.NORMS:
            yield f"{path}.norm={self.norm!r}: must be one of {sorted(norms.NORMS)}"
        for name in ("logit_softcap", "mtp"):
            if getattr(self, name) < 0:
                yield f"{path}.{name}={getattr(self, name)}: must not be negative"
        yield from config.dtype_problems(self, path, "dtype", "param_dtype")
        yield from turn_problems(self, segments_of, path)
        yield from self._attention_problems(path, root)
        yield from self._moe_problems(path, root)
        yield from self._mesh_problems(path, root.mesh)

    def _attention_problems(self, path, root):
        if self.qk_norm not in QK_NORMS:
            yield f"{path}.qk_norm={self.qk_norm!r}: must be one of {list(QK_NORMS)}"
        for name in ("window", "clip_qkv", "attention_softcap"):
            if getattr(self, name) < 0:
                yield f"{path}.{name}={getattr(self, name)}: must not be negative"
        every = self.full_attention_every
        if every < 0 or every == 1:
            yield f"{path}.full_attention_every={every}: must be 0, or at least 2"
        if every and not self.window:
            yield (
                f"{path}.full_attention_every={every} would be ignored: all blocks see "
                f"all positions; set {path}.window"
            )
        given = "latent.rope_dim" if self.latent else "head_dim"
        name, width = f"{path}.{given}", self.rope_width
        yield from self.rope.width_problems(f"{path}.rope", width, name)
        if self.latent is not None:
            unused = ("num_kv_heads", "head_dim", "attention_bias", "clip_qkv")
            found = [n for n in unused if getattr(self, n)]
            found += ["qk_norm"] * (self.qk_norm != "none")
            for name in found:
                yield (
                    f"{path}.{name}={getattr(self, name)!r}: latent attention has "
                    f"none; leave it out, or {path}.latent"
                )
        if isinstance(self.attention, cudnn.CuDNN):
            shards = max(1, root.mesh.context)
            (call, *_) = self.attention_calls(root.data.sequence_length, shards)
            # The type may yet change: `check` runs in float32.
            if reason := cudnn.misfit(dataclasses.replace(call, dtype="bfloat16")):
                name = f"{path}.attention"
                yield f"{name}=CuDNN: {reason}; set {name} to Auto()"

    def _moe_problems(self, path, root):
        yield from moe_problems(self, path, root)
        options = self.feed_forward
        if not isinstance(options, MoE):
            return
        if options.scorer.by_time:
            yield (
                f"{path}.feed_forward.scorer={type(options.scorer).__name__} scores "
                "the time of a noisy image, and text has none; choose another scorer, "
                "or a DiT"
            )
        reason = capabilities.not_causal(options.selector)
        predicts = root.objective is not None and root.objective.autoregressive
        if reason and predicts and not options.allow_noncausal:
            yield (
                f"{path}.feed_forward.selector={type(options.selector).__name__} in a "
                f"model that predicts the next token: {reason}, so the loss would be "
                "that of a model that sees what it predicts; choose another selector, "
                f"or set {path}.feed_forward.allow_noncausal=True"
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


def segments_of(options: Decoder) -> tuple[Segment, ...]:
    """Cuts the blocks into runs of one repeating pattern each."""
    every = options.full_attention_every or 1
    return cut(options.feed_forward, options.windows(), every)
