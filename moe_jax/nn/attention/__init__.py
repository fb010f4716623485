"""Attentions within the documents of a row, causal or not, with grouped queries.

Each is `(options, q, k, v, segments, scoring) -> mixed`, on one shard:

| argument | shape | |
|---|---|---|
| q | (B, S, H, Dh) | the shard's queries, already divided by sqrt(Dh) |
| k | (B, M, Hkv, Dh) | of the whole row; query head h reads kv head h Hkv / H |
| v | (B, M, Hkv, Dv) | of the whole row |
| segments | `Segments` | who sees whom |
| scoring | `Scoring` | causality, window, cap of the scores, sinks |
| mixed | (B, S, H, Dv) | in the type of q; scores and softmax are float32 or wider |

All give the same result, or refuse: what a kernel does not take its `misfit` says.
`Scores` is the formula, the others avoid its array of all scores (B, H, S, M). Grouped
queries are those of Ainslie et al. 2023.
"""

from moe_jax.nn.attention import auto, blocked, cudnn, scores, splash

ATTENTIONS = {
    scores.Scores: scores.attend,
    blocked.Blocked: blocked.attend,
    splash.Splash: splash.attend,
    cudnn.CuDNN: cudnn.attend,
    auto.Auto: auto.attend,
}
