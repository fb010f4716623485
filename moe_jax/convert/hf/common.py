"""Parts of a config.json that families share, both ways."""

from typing import Any

from moe_jax.convert.hf.fields import Fields
from moe_jax.models.decoder_config import Decoder, segments_of
from moe_jax.models.segments import MOST_BLOCKS
from moe_jax.moe.balance import Balance
from moe_jax.moe.layer import MoE
from moe_jax.nn import rope

# Names of activations there, by ours. Their "gelu" is another than ours.
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_new": "gelu",
    "relu": "relu",
    "relu2": "relu2",
}
_ACTIVATION_NAMES = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}


def activation(fields: Fields) -> str:
    """Ours, of `hidden_act`."""
    return _ACTIVATIONS[fields.only("hidden_act", *_ACTIVATIONS)]


def activation_name(ours: str) -> str:
    return _ACTIVATION_NAMES.get(ours, ours)


def shapes(fields: Fields) -> dict[str, Any]:
    """Arguments of `Decoder` that all families have under the same names."""
    return dict(
        vocab_size=fields.integer("vocab_size"),
        num_layers=num_layers(fields),
        d_model=fields.integer("hidden_size"),
        num_heads=fields.integer("num_attention_heads"),
        norm_eps=fields.number("rms_norm_eps"),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        init_std=fields.number("initializer_range", 0.02) or 0.02,
    )


def num_layers(fields: Fields) -> int:
    """Of `num_hidden_layers`."""
    found = fields.integer("num_hidden_layers")
    if found > MOST_BLOCKS:
        raise fields.refuse("num_hidden_layers", f"must be at most {MOST_BLOCKS:,}")
    return found


def heads(fields: Fields) -> dict[str, int]:
    """Arguments of `Decoder` for queries that share keys."""
    num_heads = fields.integer("num_attention_heads")
    width = fields.integer("hidden_size") // max(1, num_heads)
    return dict(
        num_kv_heads=fields.integer("num_key_value_heads", num_heads),
        head_dim=fields.integer("head_dim", width),
    )


def shape_fields(options: Decoder) -> dict[str, Any]:
    """The reverse of `shapes`."""
    return {
        "vocab_size": options.vocab_size,
        "num_hidden_layers": options.num_layers,
        "hidden_size": options.d_model,
        "num_attention_heads": options.num_heads,
        "rms_norm_eps": options.norm_eps,
        "tie_word_embeddings": options.tie_embeddings,
        "initializer_range": options.init_std,
    }


def head_fields(options: Decoder) -> dict[str, Any]:
    """The reverse of `heads`."""
    return {
        "num_key_value_heads": options.kv_heads,
        "head_dim": options.width_per_head,
    }


def rotary(fields: Fields, theta: float, interleaved: bool = False) -> rope.Rope:
    """Rotary positions, of `rope_parameters` or, before it, `rope_scaling`.

    Args:
      fields: the config.
      theta: of the family, where none is given.
      interleaved: whether neighbours are pairs.
    """
    old, new = fields.get("rope_scaling", None), fields.get("rope_parameters", None)
    theta = fields.number("rope_theta", theta)
    fields.only("partial_rotary_factor", 1.0)  # The families here know no other.
    inner = Fields(old or new or {}, f"{fields.where}: rope_parameters")
    kind = inner.get("rope_type", inner.get("type", "default"))
    if kind not in _SCALINGS:
        known = ", ".join(_SCALINGS)
        raise fields.refuse(
            "rope_scaling" if old else "rope_parameters",
            f"the kind {kind!r} is not supported; {known} are",
        )
    inner.only("partial_rotary_factor", 1.0)
    found = rope.Rope(
        theta=inner.number("rope_theta", theta),
        interleaved=interleaved,
        scaling=_SCALINGS[kind](inner, fields),
    )
    if notes := inner.notes():
        raise fields.refuse("rope_parameters", f"{notes[0]} here")
    return found


def _linear(inner: Fields, fields: Fields) -> rope.Linear:
    return rope.Linear(factor=inner.number("factor"))


def _llama3(inner: Fields, fields: Fields) -> rope.Llama3:
    return rope.Llama3(
        factor=inner.number("factor"),
        low_frequency_factor=inner.number("low_freq_factor"),
        high_frequency_factor=inner.number("high_freq_factor"),
        original_length=inner.integer("original_max_position_embeddings"),
    )


def _yarn(inner: Fields, fields: Fields) -> rope.YaRN:
    original = inner.integer("original_max_position_embeddings")
    factor = inner.number("factor", None)
    all_dim = inner.number("mscale_all_dim", 0.0)
    mscale = inner.number("mscale", 0.0)
    return rope.YaRN(
        factor=factor or fields.integer("max_position_embeddings") / original,
        original_length=original,
        beta_fast=inner.number("beta_fast", 32.0),
        beta_slow=inner.number("beta_slow", 1.0),
        mscale=mscale if all_dim else 0.0,  # By itself it counts nowhere.
        mscale_all_dim=all_dim,
        attention_factor=inner.number("attention_factor", 0.0),
        truncate=inner.flag("truncate", True),
    )


def _long_rope(inner: Fields, fields: Fields) -> rope.LongRope:
    original = fields.integer("original_max_position_embeddings", None)
    numbers = lambda name: tuple(float(v) for v in inner.items(name))
    return rope.LongRope(
        short_factor=numbers("short_factor"),
        long_factor=numbers("long_factor"),
        original_length=inner.integer("original_max_position_embeddings", original)
        or fields.integer("original_max_position_embeddings"),
        short_mscale=inner.number("short_mscale"),
        long_mscale=inner.number("long_mscale"),
    )


_SCALINGS = {
    "default": lambda inner, fields: None,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _long_rope,
}


def rotary_fields(options: rope.Rope) -> dict[str, Any]:
    """The reverse of `rotary`, under the names of version 5 and those before it."""
    found = {"rope_theta": options.theta, **_scaling_fields(options.scaling)}
    scaled = options.scaling is not None
    return {
        "rope_parameters": found,
        "rope_theta": options.theta,
        "rope_scaling": dict(found) if scaled else None,
    }


def _scaling_fields(scaling: Any) -> dict[str, Any]:
    if scaling is None:
        return {"rope_type": "default"}
    if isinstance(scaling, rope.Linear):
        return {"rope_type": "linear", "factor": scaling.factor}
    original = {"original_max_position_embeddings": scaling.original_length}
    if isinstance(scaling, rope.Llama3):
        return original | {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
        }
    if isinstance(scaling, rope.LongRope):
        names = ("short_factor", "long_factor", "short_mscale", "long_mscale")
        values = {name: getattr(scaling, name) for name in names}
        lists = {n: list(v) if isinstance(v, tuple) else v for n, v in values.items()}
        return original | {"rope_type": "longrope"} | lists
    names = ("factor", "beta_fast", "beta_slow", "truncate")
    optional = ("mscale", "mscale_all_dim", "attention_factor")
    return (
        original
        | {"rope_type": "yarn"}
        | {name: getattr(scaling, name) for name in names}
        | {name: v for name in optional if (v := getattr(scaling, name))}
    )


def layer_pattern(fields: Fields, types: list[str], window: int) -> dict[str, int]:
    """Arguments of `Decoder` for the attention of each layer, of `layer_types`."""
    full = [kind == "full_attention" for kind in types]
    if set(types) - {"full_attention", "sliding_attention"}:
        raise fields.refuse("layer_types", "holds a kind that is not supported")
    if all(full) or not window:
        return dict(window=0, full_attention_every=0)
    if not any(full):
        return dict(window=window, full_attention_every=0)
    every = full.index(True) + 1
    if full != [(i + 1) % every == 0 for i in range(len(full))]:
        raise fields.refuse(
            "layer_types",
            "only a pattern in which each n-th layer, and no other, has "
            "full_attention is supported",
        )
    return dict(window=window, full_attention_every=every)


def layer_types(options: Decoder) -> list[str]:
    """The reverse of `layer_pattern`."""
    windows = options.windows()
    return ["sliding_attention" if window else "full_attention" for window in windows]


def moe_layers(options: Decoder) -> list[bool]:
    """Whether each block is MoE."""
    return [
        kind.moe
        for segment in segments_of(options)
        for kind in segment.blocks * segment.repeats
    ]


def sparse_pattern(fields: Fields) -> dict[str, int]:
    """`first_dense` and `every`, of `decoder_sparse_step` and `mlp_only_layers`."""
    layers = num_layers(fields)
    step = fields.integer("decoder_sparse_step", 1)
    dense = fields.items("mlp_only_layers", [])
    moe = [i for i in range(layers) if step and (i + 1) % step == 0 and i not in dense]
    if moe:
        every = moe[1] - moe[0] if moe[1:] else layers - moe[0]
        first = moe[0] + 1 - every
        if first >= 0 and moe == list(range(moe[0], layers, every)):
            return dict(first_dense=first, every=every)
    raise fields.refuse(
        "mlp_only_layers",
        f"with decoder_sparse_step={step} the layers with experts are {moe}; only the "
        "first k layers may be dense, and of those after them all but each n-th",
    )


def sparse_fields(options: Decoder) -> dict[str, Any]:
    """The reverse of `sparse_pattern`."""
    ff = options.feed_forward
    if ff.first_dense % ff.every == 0:
        dense = list(range(ff.first_dense))
        return {"decoder_sparse_step": ff.every, "mlp_only_layers": dense}
    dense = [i for i, is_moe in enumerate(moe_layers(options)) if not is_moe]
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


def has_dense(pattern: dict[str, int]) -> bool:
    return pattern["first_dense"] > 0 or pattern["every"] > 1


def pooled_balance(fields: Fields, default: float) -> Balance:
    """The loss of `router_aux_loss_coef`, over the tokens of all layers together."""
    weight = fields.number("router_aux_loss_coef", default)
    share = "tokens" if weight else "assignments"
    return Balance(
        load_balance_weight=0.0, z_weight=0.0, pooled_weight=weight, load_share=share
    )


def pooled_fields(options: MoE) -> dict[str, Any]:
    """The reverse of `pooled_balance`; nothing where the loss is another."""
    if options.balance.load_share != "tokens" or not options.balance.pooled_weight:
        return {}
    return {"router_aux_loss_coef": options.balance.pooled_weight}


def sequence_balance(fields: Fields, weight: float, **bias: float) -> Balance:
    """The loss of `aux_loss_alpha`, over each row where `seq_aux` (DeepSeek)."""
    weight = fields.number("aux_loss_alpha", weight)
    name = "sequence_weight" if fields.flag("seq_aux", True) else "load_balance_weight"
    return Balance(
        **{"load_balance_weight": 0.0, "z_weight": 0.0, **bias, name: weight}
    )
