"""Mutual information of known tables, its bias, and the pictures of use."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.quality import expert_use, heat_maps


def test_information_of_known_tables():
    binary = lambda p: -p * np.log2(p) - (1 - p) * np.log2(1 - p)
    tables = [
        [[5, 0], [0, 5]],  # the expert says which: one bit
        [[2, 6], [1, 3]],  # independent
        [[3, 1], [1, 3]],  # a channel that flips one in four
        [[0, 0], [0, 0]],
        [[4, 4], [0, 0]],  # one dead expert
    ]
    found = expert_use.mutual_information(np.array(tables))
    np.testing.assert_allclose(found, [1, 0, 1 - binary(0.25), 0, 0], atol=1e-12)
    eight = np.kron(np.eye(4, dtype=int), np.ones((1, 2), int))  # groups in pairs
    np.testing.assert_allclose(expert_use.mutual_information(eight), 2)


def test_bias_is_what_independent_counts_show():
    rng = np.random.default_rng(0)
    share_eg = np.outer([0.5, 0.3, 0.2], [0.25] * 4)
    drawn = rng.multinomial(600, share_eg.ravel(), size=2000).reshape(2000, 3, 4)
    found = expert_use.of_counts(drawn)
    assert found.floor is None
    np.testing.assert_allclose(found.bias, 2 * 3 / (2 * 600 * np.log(2)))
    assert abs(found.bits.mean() / found.bias[0] - 1) < 0.06
    # A row that never occurs has no part in it.
    dead = np.concatenate([drawn, np.zeros((2000, 1, 4), int)], axis=1)
    np.testing.assert_array_equal(expert_use.bias(dead), found.bias)


def test_floor_knows_that_tokens_of_an_image_go_together():
    rng = np.random.default_rng(1)
    # Each image has an expert of its own liking, and classes mean nothing.
    liking = rng.integers(4, size=300)
    counts = np.zeros((300, 2, 4), int)
    counts[np.arange(300), :, liking] = 50
    group = rng.integers(5, size=300)
    found = expert_use.of_images(counts, group, 5)
    assert (found.bits > 20 * found.bias).all()  # that would be taken for something
    assert (found.floor < 3 * found.bits).all() and (found.bits < 3 * found.floor).all()
    # Where the class is what the image likes, it stands far above the floor.
    told = expert_use.of_images(counts, liking, 4)
    np.testing.assert_allclose(told.bits, 2, atol=0.05)
    assert (told.above > 1.9).all() and (found.above < 0.03).all()


def test_counts_of_images_add_up():
    rng = np.random.default_rng(2)
    counts, group = rng.integers(0, 9, (20, 3, 4)), rng.integers(0, 5, 20)
    found = expert_use.by_group(counts, group, 6)
    assert found.shape == (3, 4, 6) and not found[..., 5].any()
    for g in range(5):
        np.testing.assert_array_equal(found[..., g], counts[group == g].sum(0))


def test_count_against_a_loop():
    rng = np.random.default_rng(3)
    expert, valid = rng.integers(0, 4, (30, 2)), rng.random((30, 2)) < 0.7
    group = rng.integers(-1, 4, 30)  # -1 and 3 are outside
    want = np.zeros((4, 3), int)
    for t in range(30):
        for k in range(2):
            if valid[t, k] and 0 <= group[t] < 3:
                want[expert[t, k], group[t]] += 1
    found = jax.jit(expert_use.count, static_argnums=(3, 4))(
        jnp.asarray(expert), jnp.asarray(valid), jnp.asarray(group), 4, 3
    )
    np.testing.assert_array_equal(found, want)


def test_share():
    found = expert_use.share([[3, 0, 0], [1, 2, 0]])
    np.testing.assert_allclose(found, [[1.5, 0, np.nan], [0.5, 2, np.nan]])


def test_table():
    by_time = expert_use.Information(
        np.array([0.5, 0.25]), np.array([0.01, 0.01]), np.array([0.02, 0.03])
    )
    by_place = expert_use.Information(np.array([0.0, 1.0]), np.array([0.001, 0.002]))
    lines = expert_use.table({"time": by_time, "position": by_place}).splitlines()
    assert lines[1].split() == ["layer", "time", "position"]
    assert lines[2].split() == ["0", "0.5000", "(0.0200)", "0.0000", "(0.0010)"]
    assert lines[3].split() == ["1", "0.2500", "(0.0300)", "1.0000", "(0.0020)"]
    assert len({len(line) for line in lines[1:]}) == 1


def test_colours():
    found = heat_maps.colours(np.array([0, 0.25, 1, 2, 4, 99, np.nan])).tolist()
    blue, white, red = ([33, 69, 140], [250, 250, 250], [158, 27, 40])
    assert found[:3] == [blue, blue, white] and found[4:6] == [red, red]
    assert found[3] == [233, 142, 112] and found[6] == [205, 205, 205]


def cells(picture, colour):
    return (picture == np.array(colour)).all(-1)


def test_picture_by_group():
    counts = np.zeros((2, 4, 10), int)
    counts[0] = 1  # even
    counts[1, 2] = 5  # one expert does all
    found = heat_maps.by_group(counts, "Experts by time", [str(i) for i in range(10)])
    assert found.dtype == np.uint8 and found.shape[2] == 3
    red = np.argwhere(cells(found, [158, 27, 40]))
    red = red[red[:, 0] > found.shape[0] // 2]  # below the legend
    tall, wide = np.ptp(red, axis=0) + 1
    assert len(red) == tall * wide == 22 * 48 * 10  # one whole row
    blue = np.argwhere(cells(found, [33, 69, 140]))
    assert (blue[:, 0] > found.shape[0] // 2).sum() == 3 * len(red)


def test_picture_by_position():
    counts = np.ones((1, 2, 6), int)
    counts[0, 0, 5], counts[0, 1, 5] = 0, 7  # the last patch is the second expert's
    found = heat_maps.by_position(counts, 2, 3, "Experts by position")
    side = 56 // 3
    page = found[60:]
    blue = np.argwhere(cells(page, [33, 69, 140]))
    red = np.argwhere(cells(page, [233, 142, 112]))
    assert len(blue) == len(red) == side * side
    assert (red.min(0) - blue.min(0)).tolist() == [0, 3 * side + 8]


def test_pictures_say_what_does_not_fit():
    counts = np.zeros((1, 2, 6))
    with pytest.raises(UserError, match="5 names of groups and 0 notes; needs 6"):
        heat_maps.by_group(counts, "", ["a"] * 5)
    with pytest.raises(UserError, match="6 positions: they are not 2 x 2"):
        heat_maps.by_position(counts, 2, 2, "")
    with pytest.raises(UserError, match=r"needs \(layers, experts, groups\)"):
        heat_maps.by_group(counts[:0], "", [])
