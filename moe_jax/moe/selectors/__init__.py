"""Selectors: logits to `Routing` or `Mixing`, as pure functions in the global view.

Each is `(options, logits_te, tokens, router_state, mode, override, key) -> Routing`;
the continuous ones return a `Mixing`. `LOSSES` has losses that belong to one selector,
`(options, routing) -> {name: weighted loss}`. What combines with what stands in
`moe/capabilities.py`.
"""

from moe_jax.moe.selectors import (
    expert_choice,
    global_top_k,
    group_limited,
    hashing,
    mixture_of_tokens,
    soft_moe,
    sparse_mixer,
    sparse_mixer_v2,
    top_k,
    top_p,
)

SELECTORS = {
    top_k.TopK: top_k.select,
    group_limited.GroupLimited: group_limited.select,
    top_p.TopP: top_p.select,
    hashing.Hash: hashing.select,
    expert_choice.ExpertChoice: expert_choice.select,
    sparse_mixer.SparseMixer: sparse_mixer.select,
    sparse_mixer_v2.SparseMixerV2: sparse_mixer_v2.select,
    global_top_k.GlobalTopK: global_top_k.select,
    soft_moe.SoftMoE: soft_moe.select,
    mixture_of_tokens.MixtureOfTokens: mixture_of_tokens.select,
}

LOSSES = {top_p.TopP: top_p.losses}
