"""Handwritten digits that come with the package: no download, no other package.

They are the test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin and
C. Kaynak, UCI Machine Learning Repository, 1998, doi.org/10.24432/C50P49, published
there under CC BY 4.0), which scikit-learn distributes as `load_digits`. `digits.npz`
holds images uint8 (1797, 8, 8), each value how many of 4 x 4 pixels were dark, and
labels uint8 (1797,).
"""

import hashlib
import importlib.resources
import io

import numpy as np

from moe_jax import config as config_lib
from moe_jax.data.images import examples

_FILE = "digits.npz"
_LARGEST = 16


@config_lib.node
class Digits(config_lib.ImageSourceConfig):
    """1797 grey images of 8 x 8 pixels in ten classes; 0..16 becomes 0..255."""


def load(source: Digits, data: config_lib.BaseDataConfig) -> examples.Images:
    """Reads the digits."""
    del source
    content = importlib.resources.files(__package__).joinpath(_FILE).read_bytes()
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        counts, labels = arrays["images"], arrays["labels"]
    images = np.round(counts * (255 / _LARGEST)).astype(np.uint8)
    identity = {"kind": "digits", "sha256": hashlib.sha256(content).hexdigest()}
    parts = {"train": (images, labels)}
    return examples.of_arrays(identity, parts, data, "data.source=Digits()")
