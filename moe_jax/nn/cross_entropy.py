"""Cross-entropy over a vocabulary, without the logits of all tokens in memory.

Chunks of tokens go through the output matrix one after another, and their logits are
forgotten. The sum of the losses has a derivative of its own: it makes the gradients of
a chunk while its logits are there, so that they are computed once. This is the fused
linear cross-entropy of Liger Kernel (Hsu et al. 2024, arXiv:2410.10989), on a mesh.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from moe_jax.nn import module
from moe_jax.parallel import collectives, rules, varying, whole
from moe_jax.parallel.mesh import platform

_LEAST_BYTES = 16 * 2**20
_LANES = 128  # Columns of a tile of TPUs.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is static.

    Attributes:
      axes: of the output matrix, ("embed", "vocab") or the reverse.
      z_weight: of the squared log-normaliser.
      softcap: c of `c tanh(logit / c)` (Gemma 2, arXiv:2408.00118); 0: none.
      chunk: tokens of one shard whose logits are there at once, up to a multiple of 8;
        0: `chunk_of`.
    """

    axes: rules.Axes = ("embed", "vocab")
    z_weight: float = 0.0
    softcap: float = 0.0
    chunk: int = 0


def chunk_of(width: int, vocab: int) -> int:
    """Tokens of a chunk: its logits take no more than the matrix's gradient does.

    Both are in float32. That gradient is there in any case, and is read and written
    once a chunk: with as many tokens as the matrix has rows, the products take longer.
    Small models have up to 16 MiB.

    Args:
      width: D.
      vocab: V of one shard.
    """
    return max(width, _LEAST_BYTES // (4 * vocab))


def logits(
    hidden: jax.Array,
    matrix: jax.Array,
    axes: rules.Axes,
    bias: jax.Array | None = None,
    softcap: float = 0.0,
) -> jax.Array:
    """(..., D) -> (..., V), float32 or wider; the matrix has these axes."""
    wide = module.accumulation_dtype(hidden.dtype)
    matrix = matrix.astype(hidden.dtype)
    shape = "dv" if axes[0] == "embed" else "vd"
    found = jnp.einsum(
        f"...d,{shape}->...v", hidden, matrix, preferred_element_type=wide
    )
    if bias is not None:
        found = found + bias.astype(wide)
    return softcap * jnp.tanh(found / softcap) if softcap else found


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def summed(
    options: Options,
    hidden: jax.Array,
    matrix: jax.Array | whole.Whole,
    targets: jax.Array,
    weights: jax.Array,
    bias: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Weighted sums over tokens; the first is cheap to differentiate.

    Under a mesh it runs in `shard_map`: the matrix is gathered once in the type of
    `hidden`, its gradient leaves by reduce-scatters, and the log-normaliser is put
    together over the shards of the vocabulary.

    Args:
      options: what is static.
      hidden: (B, S, D), split as ("batch", "sequence", None).
      matrix: (D, V) or (V, D), split as `options.axes`, or a `whole.Whole`.
      targets: (B, S) int32.
      weights: (B, S) float.
      bias: (V,), added to the logits; split as ("vocab",).

    Returns:
      () of `nll + z_weight * log_normaliser ** 2` in nats, and () of `nll` alone.
    """
    inputs = (hidden, matrix, targets, weights, bias)
    nll, normaliser = _run(options, False, *inputs)[:2]
    return _sums(options, nll, normaliser, weights)


def _sums(options, nll, normaliser, weights):
    weights = weights.astype(nll.dtype)
    plain = total = jnp.sum(nll * weights)
    if options.z_weight:
        squares = jnp.sum(jnp.square(normaliser) * weights)
        total = total + options.z_weight * squares
    return total, plain


def _forward(options, *inputs):
    is_primal = lambda leaf: isinstance(leaf, CustomVJPPrimal)
    inputs = jax.tree.map(lambda primal: primal.value, inputs, is_leaf=is_primal)
    nll, normaliser, *grads = _run(options, True, *inputs)
    # Else the compiler sums the matrix's gradient last: all of it would live till then.
    grads = jax.lax.optimization_barrier(grads)
    sums = _sums(options, nll, normaliser, inputs[3])
    return sums, (inputs, nll, normaliser, grads)


def _backward(options, kept, given):
    inputs, nll, normaliser, grads = kept
    hidden, matrix, _, weights, bias = inputs
    to_total, to_plain = (0.0 if isinstance(g, SymbolicZero) else g for g in given)
    squares = options.z_weight * jnp.square(normaliser)
    to_weights = to_total * (nll + squares) + to_plain * nll
    if not options.z_weight:
        to_total = to_total + to_plain  # The two are one sum.
    grads = jax.tree.map(lambda g: to_total * g, grads)
    if options.z_weight and not isinstance(given[1], SymbolicZero):
        # Nobody trains on this one: it may cost the logits once more.
        without = dataclasses.replace(options, z_weight=0.0)
        more = _run(without, True, *inputs)[2:]
        grads = jax.tree.map(lambda g, m: g + to_plain * m, grads, list(more))
    typed = lambda g, of: g.astype(of.dtype)
    places = [hidden, whole.place(matrix), bias]
    to_hidden, to_matrix, to_bias = jax.tree.map(typed, grads, places)
    if whole.is_whole(matrix):
        to_matrix = whole.Whole(value=None, slot=to_matrix)
    return to_hidden, to_matrix, None, to_weights.astype(weights.dtype), to_bias


summed.defvjp(_forward, _backward, symbolic_zeros=True)


def _run(options, with_grads, hidden, matrix, targets, weights, bias):
    """Per token: nll and log-normaliser (B, S); with gradients those of the total."""
    inputs = (hidden, matrix, targets, weights, bias)
    if jax.sharding.get_abstract_mesh().empty:
        return _shard(options, with_grads, (), *inputs)
    tokens = rules.spec(("batch", "sequence"))
    rows, split = rules.spec(("batch", "sequence", None)), rules.spec(options.axes)
    of_bias = None if bias is None else rules.spec(("vocab",))
    of_matrix = whole.spec(matrix, options.axes)
    return jax.shard_map(
        functools.partial(_shard, options, with_grads, rules.mesh_axes("vocab")),
        in_specs=(rows, of_matrix, tokens, tokens, of_bias),
        out_specs=(tokens, tokens, rows, split, of_bias)[: 5 if with_grads else 2],
    )(*inputs)


def _shard(options, with_grads, vocab_names, hidden, matrix, targets, weights, bias):
    """One shard's part of `_run`; without a mesh, and names, all of it."""
    dim, parts = options.axes.index("embed"), (whole.place(matrix), bias)
    wide = module.accumulation_dtype(hidden.dtype)
    matrix = module.cast(matrix, hidden.dtype)
    rows = tuple(a.reshape(-1, *a.shape[2:]) for a in (hidden, targets, weights))
    names, across = (), None
    if vocab_names:
        names = rules.mesh_axes("embed")
        across = _across(names, rows[0].shape[0], parts[0].shape[1 - dim])
        matrix = _bring(matrix, names, across, dim)
        matrix, bias = varying.vary_like((matrix, bias), hidden)
    shards, summed_by, own_bias = 1, vocab_names, bias
    if across:
        shards, summed_by = jax.lax.axis_size(across), (*vocab_names, across)
        rows = tuple(jax.lax.all_gather(a, across, tiled=True) for a in rows)
        own_bias = None if bias is None else _own(across, bias)
    zeros = lambda w: jnp.zeros_like(w, wide)
    total = jax.tree.map(zeros, (matrix, own_bias)) if with_grads else None
    size = options.chunk or chunk_of(matrix.shape[dim], shards * matrix.shape[1 - dim])
    step = functools.partial(_chunk, options, vocab_names, summed_by, matrix, own_bias)
    total, found = _in_chunks(step, total, rows, shards * size)
    if across:
        nll, normaliser, *to_hidden = found
        split = functools.partial(jax.lax.psum_scatter, axis_name=across, tiled=True)
        found = (_own(across, nll), _own(across, normaliser), *map(split, to_hidden))
    found = tuple(a.reshape(*hidden.shape[:2], *a.shape[1:]) for a in found)
    if not with_grads:
        return found
    if vocab_names:
        # In the type of the computation, as the gradients of all weights are sent.
        of_matrix = _send(total[0].astype(hidden.dtype), names, across, dim)
        of_bias = total[1]
        if across and bias is not None:  # The others' entries come with the sum.
            zeros = jnp.zeros_like(bias, wide)
            first = own_bias.size * jax.lax.axis_index(across)
            of_bias = jax.lax.dynamic_update_slice(zeros, of_bias, (first,))
        of_parts = lambda g, w: collectives.total_like(g, w).astype(wide)
        total = jax.tree.map(of_parts, (of_matrix, of_bias), parts)
    return *found, *total


def _across(names: tuple[str, ...], tokens: int, vocab: int) -> str | None:
    """The mesh axis over which tokens are gathered in place of the matrix.

    Of the axes that split the matrix's rows the slowest, over n shards, is gathered
    last: `D V (n - 1) / n` elements a shard, and its gradient as many. With V split
    over it, `T D (n - 1)` bring the tokens together, and what turns the matrix is n or
    more times less than its gather was. So it is done where that gather is larger even
    with another n-th of it, `T < V (n - 1) / n^2`. The sum of the matrix's gradient is
    then read and written n times less as well.

    Args:
      names: mesh axes of the matrix's rows.
      tokens: T of one shard.
      vocab: V of one shard.
    """
    name = next((name for name in names if jax.lax.axis_size(name) > 1), None)
    if name is None:
        return None
    n = jax.lax.axis_size(name)
    return name if vocab % n == 0 and tokens * n * n < vocab * (n - 1) else None


def _bring(part, names, across, dim):
    """All rows of the matrix, (D, V) or (V, D), with V split over `across`."""
    if whole.is_whole(part):  # Its rows are here, and all of V.
        return _own(across, part.value, 1 - dim) if across else part.value
    if not across:
        return collectives.gather(part, names, dim)
    # Rows stand by `across` first, so that theirs is a dimension of its own.
    x = jnp.expand_dims(part, dim)
    x = jax.lax.all_to_all(x, across, 2 * (1 - dim), dim, tiled=True)
    x = collectives.gather(x, tuple(n for n in names if n != across), dim + 1)
    return x.reshape(*x.shape[:dim], -1, *x.shape[dim + 2 :])


def _send(grad, names, across, dim):
    """The reverse of `_bring`: sums over the shards, each of which keeps its rows."""
    if not across:
        if dim or platform() != "tpu":
            return collectives.scatter(grad, names, dim)
        vocab = grad.shape[1]
        grad = jnp.pad(grad, ((0, 0), (0, _columns(vocab) - vocab)))
        return collectives.scatter(grad, names, dim)[:, :vocab]
    shards = jax.lax.axis_size(across)
    x = grad.reshape(*grad.shape[:dim], shards, -1, *grad.shape[dim + 1 :])
    x = collectives.scatter(x, tuple(n for n in names if n != across), dim + 1)
    x = jax.lax.all_to_all(x, across, dim, 2 * (1 - dim), tiled=True)
    return jnp.squeeze(x, dim)


def _columns(vocab: int) -> int:
    """Columns that XLA:TPU can cut into pieces: its tiles of them have small factors.

    It makes an all-reduce, which sends twice the bytes, of a reduce-scatter over n
    shards if a prime factor of the number of tiles is beyond some 1400 / n (seen in
    programs of libtpu 0.0.52, n = 16 to 64). That of 129280 has 101.
    """
    tiles = -(-vocab // _LANES)
    while not _has_small_factors(tiles):
        tiles += 1
    return tiles * _LANES


def _has_small_factors(number: int) -> bool:
    for prime in (2, 3, 5, 7):
        while number % prime == 0:
            number //= prime
    return number == 1


def _own(name: str, a: jax.Array, dim: int = 0) -> jax.Array:
    """This shard's entries of those of a mesh axis."""
    count = a.shape[dim] // jax.lax.axis_size(name)
    first = count * jax.lax.axis_index(name)
    return jax.lax.dynamic_slice_in_dim(a, first, count, dim)


def _in_chunks(step, total, rows, size):
    """`total, results = step(total, some rows)` for all rows, `size` at a time."""
    length = rows[0].shape[0]
    count = -(-length // size)
    if count == 1:
        return step(total, rows)
    size = -(-length // (8 * count)) * 8  # As even as it goes.
    count = -(-length // size)
    missing = count * size - length

    def cut(a):
        a = jnp.pad(a, [(0, missing)] + [(0, 0)] * (a.ndim - 1)) if missing else a
        return a.reshape(count, size, *a.shape[1:])

    total, found = jax.lax.scan(step, total, tuple(map(cut, rows)))
    return total, tuple(a.reshape(-1, *a.shape[2:])[:length] for a in found)


def _chunk(options, vocab_names, summed_by, matrix, bias, total, rows):
    """Adds a chunk's gradients of matrix and bias to `total`, unless that is None.

    Args:
      options: what is static.
      vocab_names: mesh axes over which the rows' gradient is summed here.
      summed_by: all axes that split the vocabulary.
      matrix: (D, V) or (V, D).
      bias: (V,), or None.
      total: gradients of these two so far, or None.
      rows: hidden (C, D), targets and weights (C,).

    Returns:
      It, and nll and log-normaliser (C,), with the gradient of the rows (C, D).
    """
    hidden, targets, weights = rows
    logits_cv = logits(hidden, matrix, options.axes, bias, options.softcap)
    ids = jnp.arange(logits_cv.shape[1], dtype=targets.dtype)
    if summed_by:
        targets = targets - jax.lax.axis_index(summed_by) * ids.size
    is_target = targets[:, None] == ids
    largest = collectives.largest(jnp.max(logits_cv, axis=1), summed_by)
    powers = jnp.sum(jnp.exp(logits_cv - largest[:, None]), axis=1)
    normaliser = largest + jnp.log(collectives.total(powers, summed_by))
    chosen = jnp.sum(jnp.where(is_target, logits_cv, 0), axis=1)
    nll = normaliser - collectives.total(chosen, summed_by)
    if total is None:
        return None, (nll, normaliser)
    scale = 1 + 2 * options.z_weight * normaliser[:, None]
    slopes = scale * jnp.exp(logits_cv - normaliser[:, None]) - is_target
    slopes = weights[:, None].astype(slopes.dtype) * slopes
    if options.softcap:
        slopes = slopes * (1 - jnp.square(logits_cv / options.softcap))
    of_bias = None if bias is None else total[1] + jnp.sum(slopes, axis=0)
    slopes = slopes.astype(hidden.dtype)  # An operand of products again.
    shape = "dv" if options.axes[0] == "embed" else "vd"
    to_hidden = jnp.einsum(f"cv,{shape}->cd", slopes, matrix)
    to_hidden = collectives.total(to_hidden, vocab_names)
    of_matrix = total[0] + jnp.einsum(
        f"cd,cv->{shape}", hidden, slopes, preferred_element_type=total[0].dtype
    )
    return (of_matrix, of_bias), (nll, normaliser, to_hidden)
