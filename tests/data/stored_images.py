"""What a source of images put into the cache."""

import numpy as np

from moe_jax.data import documents, pipeline


def stored(config):
    """By split, a list of (bytes of the pixels, label)."""
    data = pipeline.prepare(config)
    found = {}
    for split in documents.SPLITS:
        rows = data.rows(split, range(data.num_rows(split)))
        images = rows["images"]
        if data.manifest["dtype"] == "uint8":
            images = np.round((images.astype(float) + 1) * 127.5).astype(np.uint8)
        found[split] = [
            (image.tobytes(), int(label))
            for image, label in zip(images, rows["labels"], strict=True)
        ]
    return data, found


def expected(images, labels):
    return [(v.tobytes(), int(n)) for v, n in zip(images, labels, strict=True)]


def assert_holds(config, images, labels):
    """All images with their labels, each in one split, in order."""
    data, found = stored(config)
    want = expected(images, labels)
    assert len(set(want)) == len(want)
    assert sorted(found["train"] + found["validation"]) == sorted(want)
    for part in found.values():
        assert part == [pair for pair in want if pair in part]
    assert len(found["validation"]) > 0.1 * len(want)
    return data
