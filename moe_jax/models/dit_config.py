"""The diffusion transformer's config and its rules."""

import copy
import dataclasses

from moe_jax import config
from moe_jax.models import remat
from moe_jax.models.masks import MASKS
from moe_jax.models.segments import (
    Segment,
    cut,
    moe_problems,
    shrink,
    size_problems,
    turn_problems,
)
from moe_jax.moe.layer import MoE
from moe_jax.moe.selectors.hashing import Hash
from moe_jax.nn.attention import auto, cudnn
from moe_jax.nn.attention.common import Call
from moe_jax.nn.attention.splash import LANES, Splash
from moe_jax.nn.conditioning import Perturbation
from moe_jax.nn.feedforward import Dense

# Published sizes: S, B, L and XL of DiT (Peebles and Xie 2023), G of DiT-MoE (Fei et
# al. 2024).
SIZES = {
    "S": dict(num_layers=12, d_model=384, num_heads=6),
    "B": dict(num_layers=12, d_model=768, num_heads=12),
    "L": dict(num_layers=24, d_model=1024, num_heads=16),
    "XL": dict(num_layers=28, d_model=1152, num_heads=16),
    "G": dict(num_layers=40, d_model=1408, num_heads=16),
}
QK_NORMS = ("none", "layer", "head")


def mlp(d_ff: int) -> Dense:
    """The feed-forward of DiT: biases, and GELU by its tanh approximation."""
    return Dense(d_ff=d_ff, activation="gelu", gated=False, bias=True)


@config.node
class DiT(config.ModelConfig):
    """A diffusion transformer (DiT, Peebles and Xie 2023, arXiv:2212.09748).

    `DiT(**SIZES["S"], patch_size=2)` is DiT-S/2. With an `MoE` of gated experts it is
    DiT-MoE (Fei et al. 2024, arXiv:2407.11633).

    Attributes:
      image_size: height and width of an image or latent.
      in_channels: C.
      patch_size: side of the square that becomes a token; divides `image_size`.
      num_layers: blocks.
      d_model: D, a multiple of 4.
      num_heads: attention heads; divides D.
      num_classes: the condition is one of so many classes; 0: it is not.
      condition_width: the condition is a vector of this width; 0: it is not. With both
        0 there is none.
      condition_dropout: share of the images whose condition the objective withholds in
        training. The model then knows what to do without one: it has a null class, of
        the index `num_classes`, or a learned null vector. 0: it has none.
      perturbation: noise on the embedded class or vector in training.
      learned_variance: predict 2 C channels, the last C for the variance.
      log_variance: learn the logarithm of the loss' variance by time, for
        `objective.uncertainty` (EDM2, Karras et al. 2024).
      attention: one of `nn.attention.ATTENTIONS`.
      feed_forward: dense, or MoE in some or all blocks. Blocks between those of an MoE
        have the dense feed-forward of DiT, of width `dense_d_ff`.
      input_mask: one of `models.masks.MASKS` on what each block works on; None: none.
      qk_norm: of queries and keys per head: "none"; "layer", a LayerNorm (the large
        sizes of DiT-MoE); "head", an RMSNorm.
      norm_eps: of all norms.
      dtype: of the computation.
      param_dtype: of the parameters.
      remat: see `Decoder`.
    """

    data_kind = "images"
    image_size: int = 32
    in_channels: int = 4
    patch_size: int = 2
    num_layers: int = 12
    d_model: int = 384
    num_heads: int = 6
    num_classes: int = 1000
    condition_width: int = 0
    condition_dropout: float = 0.1
    perturbation: Perturbation = dataclasses.field(default_factory=Perturbation)
    learned_variance: bool = True
    log_variance: bool = False
    attention: config.AttentionConfig = dataclasses.field(default_factory=auto.Auto)
    feed_forward: config.FeedForwardConfig = dataclasses.field(
        default_factory=lambda: mlp(1536)
    )
    input_mask: config.InputMaskConfig | None = None
    qk_norm: str = "none"
    norm_eps: float = 1e-6
    dtype: str = "bfloat16"
    param_dtype: str = "float32"
    remat: str = "full"

    @property
    def out_channels(self) -> int:
        """C_out."""
        return self.in_channels * (2 if self.learned_variance else 1)

    @property
    def num_tokens(self) -> int:
        """N, of an image."""
        return (self.image_size // max(1, self.patch_size)) ** 2

    @property
    def width_per_head(self) -> int:
        return self.d_model // self.num_heads

    def attention_call(self, shards: int = 1) -> Call:
        """The call of an attention that all blocks make.

        Args:
          shards: over which the tokens of an image are split.
        """
        return Call(
            queries=self.num_tokens // shards,
            keys=self.num_tokens,
            width=self.width_per_head,
            value_width=self.width_per_head,
            dtype=self.dtype,
            causal=False,
        )

    def positions(self, data) -> int:
        """See `ModelConfig.positions`."""
        return self.num_tokens

    def row_shapes(self, data) -> dict[str, tuple[tuple[int, ...], str]]:
        """See `ModelConfig.row_shapes`."""
        image = (self.image_size, self.image_size, self.in_channels)
        return {
            "images": (image, "float32"),
            "labels": ((), "int32"),
            "weights": ((), "float32"),
        }

    def rows_together(self) -> int:
        """See `ModelConfig.rows_together`."""
        ff = self.feed_forward
        return ff.selector.rows_together() if isinstance(ff, MoE) else 1

    def uses_host(self) -> bool:
        """See `ModelConfig.uses_host`."""
        return remat.uses_host(self.remat)

    def shrunk(self) -> "DiT":
        """A small model of the same kind: same experts, routing and condition."""
        small = copy.deepcopy(self)
        small.num_heads, small.d_model = 4, 64
        small.image_size = min(self.image_size, 8 * self.patch_size)
        small.num_classes = min(self.num_classes, 16)
        if isinstance(self.attention, Splash):
            small.attention = auto.Auto()  # The kernel does not take short rows.
        small.num_layers = min(self.num_layers, shrink(small.feed_forward))
        return small

    def problems(self, path, root):
        least = dict.fromkeys(
            ("image_size", "in_channels", "patch_size", "num_layers", "num_heads"), 1
        ) | {"d_model": 4, "num_classes": 0, "condition_width": 0}
        if sizes := list(size_problems(self, path, **least)):
            yield from sizes
            return
        yield from self._size_problems(path)
        yield from self._condition_problems(path)
        if self.qk_norm not in QK_NORMS:
            yield f"{path}.qk_norm={self.qk_norm!r}: must be one of {list(QK_NORMS)}"
        yield from remat.problems(self, path, root)
        yield from config.dtype_problems(self, path, "dtype", "param_dtype")
        yield from moe_problems(self, path, root)
        yield from self._use_problems(path, root)
        yield from self._mask_problems(f"{path}.input_mask")
        yield from self._mesh_problems(path, root.mesh)

    def _size_problems(self, path):
        if self.image_size % self.patch_size:
            yield (
                f"{path}.image_size={self.image_size} is not divisible by {path}."
                f"patch_size={self.patch_size}; patch_size takes one of "
                f"{config.divisors(self.image_size)}"
            )
        if self.d_model % 4:
            yield (
                f"{path}.d_model={self.d_model}: must be a multiple of 4, for sines "
                f"and cosines of two places; the next is {-(-self.d_model // 4) * 4}"
            )
        if self.d_model % self.num_heads:
            yield (
                f"{path}.d_model={self.d_model} is not divisible by "
                f"{path}.num_heads={self.num_heads}; num_heads takes one of "
                f"{config.divisors(self.d_model)}"
            )
        yield from turn_problems(self, segments_of, path)

    def _condition_problems(self, path):
        if self.num_classes and self.condition_width:
            yield (
                f"{path}: num_classes={self.num_classes} and condition_width="
                f"{self.condition_width}: the condition is a class or a vector; set "
                "one of them to 0"
            )
        if not 0 <= self.condition_dropout < 1:
            yield (
                f"{path}.condition_dropout={self.condition_dropout}: must lie in [0, 1)"
            )
        if self.condition_dropout and not self.num_classes + self.condition_width:
            yield (
                f"{path}.condition_dropout={self.condition_dropout} would be ignored: "
                "there is no condition; set it to 0, or num_classes or condition_width"
            )
        if self.perturbation.strength and not self.num_classes + self.condition_width:
            yield (
                f"{path}.perturbation.strength={self.perturbation.strength} would be "
                "ignored: there is no condition"
            )

    def _use_problems(self, path, root):
        if root.objective is not None and root.objective.autoregressive:
            yield (
                f"{path}=DiT denoises images, but config.objective="
                f"{type(root.objective).__name__} predicts the next token; choose an "
                "objective of images, or a Decoder"
            )
        ff = self.feed_forward
        if isinstance(ff, MoE) and isinstance(ff.selector, Hash):
            yield (
                f"{path}.feed_forward.selector=Hash routes by token ids, and patches "
                "have none; choose another selector"
            )
        if isinstance(ff, MoE) and ff.allow_noncausal:
            yield (
                f"{path}.feed_forward.allow_noncausal=True would be ignored: a DiT has "
                "no causality; set it to False"
            )
        if isinstance(self.attention, cudnn.CuDNN):
            # The type may yet change: `check` runs in float32.
            call = self.attention_call(max(1, root.mesh.context))
            if reason := cudnn.misfit(dataclasses.replace(call, dtype="bfloat16")):
                name = f"{path}.attention"
                yield f"{name}=CuDNN: {reason}; set {name} to Auto()"

    def _mask_problems(self, path):
        mask = self.input_mask
        if mask is None:
            return
        if type(mask) not in MASKS:
            yield (
                f"{path} is a {type(mask).__name__}, which is none of "
                f"{[cls.__name__ for cls in MASKS]}"
            )
        yield from mask.size_problems(path, self.d_model)

    def _mesh_problems(self, path, mesh):
        wide = mesh.fsdp * mesh.expert
        for name, size, parts, axis in (
            ("d_model", self.d_model, wide, "mesh.fsdp * mesh.expert"),
            ("num_heads", self.num_heads, mesh.tensor, "mesh.tensor"),
        ):
            if parts > 0 and size % parts:
                yield (
                    f"{path}.{name}={size} is not divisible by config.{axis}={parts}; "
                    f"the next that is: {-(-size // parts) * parts}"
                )
        tokens, context = self.num_tokens, max(1, mesh.context)
        if tokens % context:
            yield (
                f"{path}: an image has {tokens} patches, which config.mesh.context="
                f"{context} does not divide; context takes one of "
                f"{config.divisors(tokens)}"
            )
        elif isinstance(self.attention, Splash) and tokens // context % LANES:
            yield (
                f"{path}.attention=Splash takes multiples of {LANES} patches on a "
                f"shard, and there are {tokens // context}; set it to Auto()"
            )


def segments_of(options: DiT) -> tuple[Segment, ...]:
    """Cuts the blocks into runs of one repeating pattern each."""
    return cut(options.feed_forward, (0,) * options.num_layers)
