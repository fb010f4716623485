"""Expert kinds: pure functions of stacked weights on padded or ragged rows.

An expert module is built by `(d_model, num_experts, options, std, out_std, dtype,
rngs)`. Its weights are stacked on a leading E with the logical axis "expert".

- `weights()` and `axes()`: nested dicts of arrays and of their logical axes;
- `before(rows)`: once per token, ahead of the dispatch (may narrow the row);
- `first`: name of the weight that rows meet first, which is asked for early, or "";
- `output_biases`: names of the weights that are added to an expert's output, which
  where its width is split must happen on one shard only;
- `rows(weights, rows, group_sizes, scale)`: static; `rows["features"]` is (e, C, D)
  without group sizes, or (R, D) with `group_sizes` (e,): the first R_0 rows belong to
  expert 0, and so on, and those beyond the last group to nobody; `scale` (R,), if it
  is there, multiplies the results;
- `after(y)`: once per token, behind the combination.
"""

from moe_jax.moe.experts import feed_forward

EXPERTS = {feed_forward.ExpertFeedForward: feed_forward.FeedForwardExperts}
