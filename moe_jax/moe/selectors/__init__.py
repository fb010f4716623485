"""Selectors: logits to `Routing` or `Mixing`, as pure functions in the global view.

Each is `(options, logits_te, tokens, router_state, mode, override, key) -> Routing`;
the continuous ones return a `Mixing`. What combines with what stands in
`moe/capabilities.py`. A selector may have more, in a dict of its own:

- `LOSSES`: `(options, routing, tokens, scorer) -> {name: weighted loss}`, with the
  tokens as the selector saw them and the layer's scorer, a module.
- `WEIGHTS`: a module `(d_model, num_experts, options, rngs)`; what it makes of the
  tokens, (T, ...), is `Tokens.own` for the selector and its losses.
- `STATES`: what it learns without gradients, beside the bias. A class with static
  `init(options, num_experts) -> {name: array}`, `observe(options, routing, tokens) ->
  {name: sum}`, summed over micro-batches, and `update(options, state, sums)`, which
  gives the state after an optimizer step and takes leading axes too.
"""

from moe_jax.moe.selectors import (
    diff_moe,
    expert_choice,
    global_top_k,
    group_limited,
    hashing,
    mixture_of_tokens,
    pro_moe,
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
    pro_moe.ProMoE: pro_moe.select,
    pro_moe.ProMoEChoice: pro_moe.select_choice,
    diff_moe.DiffMoE: diff_moe.select,
    soft_moe.SoftMoE: soft_moe.select,
    mixture_of_tokens.MixtureOfTokens: mixture_of_tokens.select,
}

LOSSES = {
    top_p.TopP: top_p.losses,
    global_top_k.GlobalTopK: global_top_k.losses,
    pro_moe.ProMoE: pro_moe.losses,
    pro_moe.ProMoEChoice: pro_moe.losses,
    diff_moe.DiffMoE: diff_moe.losses,
}

WEIGHTS = {diff_moe.DiffMoE: diff_moe.CapacityPredictor}

STATES = {
    global_top_k.GlobalTopK: global_top_k.State,
    diff_moe.DiffMoE: diff_moe.State,
}
