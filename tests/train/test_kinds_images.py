"""What is said before a run on images that cannot end well."""

import pathlib
import types

import pytest

from moe_jax.cli import config_file
from moe_jax.errors import UserError
from moe_jax.train.kinds import images

DIGITS = pathlib.Path(__file__).parents[2] / "configs" / "dit" / "digits.py"


def check(judged=1000, held_out=377, shape=(8, 8, 1), classes=10):
    config = config_file.load(str(DIGITS))
    config.eval.judged = judged
    if classes < 2:
        config.model.num_classes = 0
    data = types.SimpleNamespace(
        image_shape=shape, num_classes=classes, num_rows={"validation": held_out}.get
    )
    images.check(config, data)


def test_what_fits_passes():
    check()
    check(judged=0, held_out=0)
    check(judged=0, classes=1)
    # 377 held-out images: 37 features, ten images for each.
    check(judged=370)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"shape": (9, 8, 1)}, "the images are 9 x 8 with 1 channels"),
        ({"shape": (8, 8, 3)}, "the images are 8 x 8 with 3 channels"),
        ({"classes": 7}, "num_classes=10: the images have 7 classes; set it to 7"),
        ({"classes": 1}, "the images have no classes; 0 compares none"),
        ({"judged": 369}, "beside 377 held-out images 370 are needed"),
        ({"held_out": 9}, "9 held-out images are too few to compare with"),
        ({"held_out": 0}, "0 held-out images are too few to compare with"),
    ],
)
def test_what_does_not_fit_is_told(wrong, message):
    with pytest.raises(UserError, match=message):
        check(**wrong)
