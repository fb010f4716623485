"""Batches of images: the same for any number of processes, complete, and augmented."""

import collections
import errno
import itertools
import json
import logging
import os

import numpy as np
import pytest

from moe_jax.data import pipeline, prepared
from moe_jax.data.images import augment, sources
from moe_jax.errors import UserError

TRAIN = {"batch_size": 8, "seed": 3, "start_step": 0, "num_steps": 6}


@pytest.fixture
def config(npz_file, make_images):
    source = sources.ImageFiles(path=str(npz_file))
    return make_images(source, flip=True, crop_padding=2)


@pytest.fixture
def data(config):
    return pipeline.prepare(config)


@pytest.fixture
def plain(config):
    """The same images as they are."""
    config.data.flip, config.data.crop_padding = False, 0
    return pipeline.prepare(config)


def assert_batches_equal(got, want):
    got, want = list(got), list(want)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def joined(parts):
    """Batches of all processes side by side."""
    for batches in zip(*parts, strict=True):
        yield {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}


@pytest.mark.parametrize("count", [1, 2, 4])
def test_batches_do_not_depend_on_process_count(data, count):
    rows = [(i * 8 // count, 8 // count) for i in range(count)]
    parts = [data.train_batches(**TRAIN, rows=part) for part in rows]
    assert_batches_equal(joined(parts), data.train_batches(**TRAIN))
    parts = [data.eval_batches(batch_size=8, rows=part) for part in rows]
    assert_batches_equal(joined(parts), data.eval_batches(batch_size=8))


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_resume_equals_skipping(data, prefetch):
    # More rows than the split has, so that both cross an epoch.
    steps = 2 * data.num_rows("train") // 8 + 2
    whole = data.train_batches(**TRAIN | {"num_steps": steps})
    resumed = data.train_batches(
        **TRAIN | {"start_step": 5, "num_steps": steps - 5}, prefetch=prefetch
    )
    assert_batches_equal(resumed, itertools.islice(whole, 5, None))


def test_late_step_is_as_fast_as_early(data):
    batches = data.train_batches(**TRAIN | {"start_step": 10**12, "num_steps": 1})
    batch = next(batches)
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
        "images": ((8, 5, 6, 3), "float32"),
        "labels": ((8,), "int32"),
        "weights": ((8,), "float32"),
    }
    assert batch["images"].min() >= -1 and batch["images"].max() <= 1
    assert batch["weights"].tolist() == [1] * 8


def pairs(batch):
    return [
        (image.tobytes(), int(label))
        for image, label in zip(batch["images"], batch["labels"], strict=True)
    ]


def test_epoch_has_every_image_once_in_another_order(plain):
    count = plain.num_rows("train")
    batches = plain.train_batches(
        batch_size=1, seed=0, start_step=0, num_steps=2 * count
    )
    seen = [pair for batch in batches for pair in pairs(batch)]
    want = pairs(plain.rows("train", range(count)))
    assert collections.Counter(seen[:count]) == collections.Counter(want)
    assert collections.Counter(seen[count:]) == collections.Counter(want)
    assert seen[:count] != seen[count:]
    assert seen[:count] != want


def test_seed_changes_order_and_augmentation(data, plain):
    one, other = ({**TRAIN, "seed": seed} for seed in (3, 4))
    assert pairs(next(plain.train_batches(**one))) != pairs(
        next(plain.train_batches(**other))
    )
    assert (augment.draws(3, 0, 9) != augment.draws(4, 0, 9)).all()


def test_augmentation_changes_from_epoch_to_epoch(data, plain):
    count = data.num_rows("train")
    options = {**TRAIN, "batch_size": count, "num_steps": 2}
    first, second = data.train_batches(**options)
    plain_first, plain_second = plain.train_batches(**options)
    place = {pair[0]: i for i, pair in enumerate(pairs(plain_first))}
    again = [place[pair[0]] for pair in pairs(plain_second)]
    same = [
        np.array_equal(first["images"][i], second["images"][j])
        for j, i in enumerate(again)
    ]
    assert sum(same) < count // 4


def slow_variants(image, padding):
    """Every mirrored and shifted form of an image, by padding and cutting."""
    height, width, _ = image.shape
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)), "edge")
    for y, x in itertools.product(range(2 * padding + 1), repeat=2):
        part = padded[y : y + height, x : x + width]
        yield (y - padding, x - padding, False), part
        yield (y - padding, x - padding, True), part[:, ::-1]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_augmented_images_are_shifts_and_mirror_images(image_arrays, flip, padding):
    images = np.repeat(image_arrays[0][:4], 200, axis=0)
    got = augment.augment(images, 5, 1000, flip, padding)
    assert got.shape == images.shape and got.dtype == images.dtype
    uses = collections.Counter()
    for n, image in enumerate(got):
        found = [k for k, v in slow_variants(images[n], padding) if (v == image).all()]
        uses[found[0]] += 1
    shifts = (2 * padding + 1) ** 2
    assert len(uses) == shifts * (1 + flip)
    assert {mirrored for *_, mirrored in uses} == ({False, True} if flip else {False})
    # All are as likely: within five standard deviations.
    mean = 800 / len(uses)
    assert all(abs(n - mean) < 5 * mean**0.5 for n in uses.values())


def test_draws_depend_on_the_place_alone():
    whole = augment.draws(7, 100, 50)
    np.testing.assert_array_equal(augment.draws(7, 120, 10), whole[20:30])
    np.testing.assert_array_equal(augment.draws(7, 149, 1), whole[49:])
    assert len(np.unique(whole)) == whole.size
    late = augment.draws(2**31 - 1, 2**62, 3)
    np.testing.assert_array_equal(augment.draws(2**31 - 1, 2**62 + 2, 1), late[2:])


def test_augmented_batches_follow_the_stream(data, plain):
    """Row r of step s is augmented by the draw at place s B + r."""
    wanted = {**TRAIN, "start_step": 4, "num_steps": 1}
    (got,) = data.train_batches(**wanted)
    (base,) = plain.train_batches(**wanted)
    for row in range(8):
        one = base["images"][row : row + 1]
        want = augment.augment(one, 3, 4 * 8 + row, True, 2)
        np.testing.assert_array_equal(got["images"][row : row + 1], want)


def test_eval_has_every_image_once_without_augmentation(data):
    count = data.num_rows("validation")
    batches = list(data.eval_batches(batch_size=8))
    assert len(batches) == -(-count // 8) and count % 8
    seen = []
    for batch in batches:
        assert batch["images"].shape == (8, 5, 6, 3)
        there = batch["weights"] == 1
        assert not batch["images"][~there].any() and not batch["labels"][~there].any()
        assert not batch["weights"][~there].any()
        seen += pairs({k: v[there] for k, v in batch.items()})
    want = pairs(data.rows("validation", range(count)))
    assert collections.Counter(seen) == collections.Counter(want)
    assert_batches_equal(data.eval_batches(batch_size=8, max_batches=1), batches[:1])


def test_a_part_of_the_evaluation_is_mixed(make_images, tmp_path):
    """Of images that are sorted by class, one batch sees all classes."""
    images = np.arange(200, dtype=np.uint8)[:, None, None].repeat(4, 1)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(200) // 50)
    config = make_images(sources.ImageFiles(path=f"{tmp_path}/a.npz"))
    config.data.validation_fraction = 0.5
    data = pipeline.prepare(config)
    assert set(data.rows("validation", range(16))["labels"].tolist()) == {0}
    batch = next(data.eval_batches(batch_size=16, max_batches=1))
    assert set(batch["labels"].tolist()) == {0, 1, 2, 3}


def test_past_the_last_row_is_padding(data):
    row = data.row("train", data.num_rows("train"))
    assert not row["images"].any() and row["weights"] == 0 and row["labels"] == 0


def test_without_held_out_images(config):
    config.data.validation_fraction = 0.0
    data = pipeline.prepare(config)
    assert data.num_rows("train") == 60
    assert list(data.eval_batches(batch_size=4)) == []


def test_one_image(make_images, tmp_path):
    np.savez(tmp_path / "a.npz", images=np.full((1, 4, 4), 9, np.uint8))
    source = sources.ImageFiles(path=f"{tmp_path}/a.npz")
    data = pipeline.prepare(make_images(source, labelled=False))
    (batch,) = data.train_batches(**TRAIN | {"num_steps": 1})
    assert (batch["images"] == np.float32(9 / 127.5 - 1)).all()


def folders_of(config):
    root = prepared.Path(config.data.folder) / "images"
    return sorted(path for path in root.iterdir() if path.suffix != ".lock")


def test_second_call_reuses(config, monkeypatch):
    first = pipeline.prepare(config)
    monkeypatch.setattr(prepared, "_build", None)  # calling it would fail
    second = pipeline.prepare(config)
    assert second.content_hash == first.content_hash
    config.data.flip = not config.data.flip
    assert pipeline.prepare(config).content_hash == first.content_hash


@pytest.mark.parametrize(
    "fields",
    [
        {"image_size": 4},
        {"channels": 1},
        {"labelled": False},
        {"validation_fraction": 0.3},
    ],
)
def test_another_form_is_other_content(config, fields):
    before = pipeline.prepare(config).content_hash
    for name, value in fields.items():
        setattr(config.data, name, value)
    assert pipeline.prepare(config).content_hash != before
    assert len(folders_of(config)) == 2


def test_files_are_bytes_of_pixels(config, image_arrays):
    data = pipeline.prepare(config)
    (folder,) = folders_of(config)
    sizes = [
        (folder / f"{split}.images").stat().st_size / (5 * 6 * 3)
        for split in ("train", "validation")
    ]
    assert sizes == [data.num_rows("train"), data.num_rows("validation")]
    assert data._files["train"].images.dtype == np.uint8
    assert isinstance(data._files["train"].images, np.memmap)
    entry = json.loads((folder / "manifest.json").read_text())["splits"]["train"]
    for file in entry["files"].values():
        content = (folder / file["name"]).read_bytes()
        assert prepared.hashlib.sha256(content).hexdigest() == file["sha256"]


def damage_cut(folder):
    path = folder / "train.images"
    path.write_bytes(path.read_bytes()[:-1])


def damage_labels(folder):
    (folder / "validation.labels.npy").unlink()


def change_manifest(folder, **fields):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def damage_version(folder):
    change_manifest(folder, format_version=0)


def damage_shape(folder):
    change_manifest(folder, shape=[5, 6, 4])


def damage_dtype(folder):
    change_manifest(folder, dtype="object")


@pytest.mark.parametrize(
    "damage", [damage_cut, damage_labels, damage_version, damage_shape, damage_dtype]
)
def test_damage_is_mended_with_a_warning(config, caplog, damage):
    want = pipeline.prepare(config).manifest
    damage(folders_of(config)[0])
    with caplog.at_level(logging.WARNING):
        assert pipeline.prepare(config).manifest == want
    assert "is damaged" in caplog.text


def test_full_disk(config, monkeypatch):
    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(prepared, "_flush", full)
    with pytest.raises(UserError, match=r"no space left in '.*' \(\d+ bytes free "):
        pipeline.prepare(config)
    assert folders_of(config) == []


def test_number_of_threads_does_not_matter(config):
    hashes = set()
    for workers in (0, 1, 3):
        config.data.workers = workers
        config.data.folder += "x"
        hashes.add(pipeline.prepare(config).content_hash)
    assert len(hashes) == 1
