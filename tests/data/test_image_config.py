"""The config of images: its rules, and who takes images and who takes text."""

import numpy as np
import pytest

from moe_jax import config as config_lib
from moe_jax import config_json
from moe_jax.data import sources as text_sources
from moe_jax.data import tokenizers
from moe_jax.data.images import sources
from moe_jax.data.images.config import ImageDataConfig
from moe_jax.diffusion.evaluation import ImageEvalConfig
from moe_jax.errors import UserError
from moe_jax.models.decoder_config import Decoder
from moe_jax.nn.attention.splash import Splash
from moe_jax.objectives.next_token import NextToken


def problems(config):
    return list(config_lib.all_problems(config.data, "config.data", config))


def test_default_has_no_problems():
    config = config_lib.Config(data=ImageDataConfig(source=sources.Digits()))
    assert problems(config) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": None}, "choose one of moe_jax.data.images.sources"),
        (
            {"source": text_sources.PythonSource()},
            "PythonSource: is no source of images",
        ),
        ({"validation_fraction": 1.0}, "must lie in [0, 1)"),
        ({"prefetch": -1}, "must not be negative"),
        ({"workers": -1}, "must not be negative"),
        ({"image_size": -1}, "must not be negative"),
        ({"crop_padding": -1}, "must not be negative"),
        ({"crop_padding": 8, "image_size": 8}, "must be less than config.data.image_"),
        ({"channels": 2}, "must be 0 (as they are), 1 or 3"),
        ({"source": sources.Idx(images="a")}, "labels='': must name a file; --config."),
        ({"source": sources.Idx(labels="a")}, "images='': must name a file"),
        (
            {"source": sources.Idx(images="a", labels="b"), "labelled": False},
            "labels='b': is not used, since data.labelled is False",
        ),
        (
            {"source": sources.Idx(images="a", labels="b", validation_labels="c")},
            "validation_labels='c': is not used, since config.data.source.validation_",
        ),
        ({"source": sources.ImageFiles()}, "path='': must name a folder or an npz"),
        ({"source": sources.TfdsImages(name="")}, "name='': must be set"),
        (
            {"source": sources.TfdsImages(label="")},
            "label='': must be set; --config.da",
        ),
        (
            {"source": sources.TfdsImages(validation_split="test")},
            "validation_fraction=0.05: must be 0 where config.data.source.validation_",
        ),
        (
            {"source": sources.ImageFiles(path="a", validation_path="b")},
            "must be 0 where config.data.source.validation_path='b' names",
        ),
        ({"source": sources.Latents()}, "images='': must name an npz or npy file"),
        ({"source": sources.Latents(images="a.npz", scale=0.0)}, "scale not 0"),
        (
            {"source": sources.Latents(images="a.npz", scale=2**64, shift=np.nan)},
            "must be finite",
        ),
        ({"source": sources.Latents(images="a.npy")}, "labels='': must name a file"),
        (
            {"source": sources.Latents(images="a.npz"), "flip": True},
            "flip=True: a laten",
        ),
        (
            {"source": sources.Latents(images="a.npz"), "image_size": 8},
            "a latent cannot",
        ),
    ],
)
def test_problems(fields, message):
    fields = {"source": sources.Digits(), **fields}
    config = config_lib.Config(data=ImageDataConfig(**fields))
    assert any(message in problem for problem in problems(config)), problems(config)


def test_text_takes_no_source_of_images():
    data = config_lib.DataConfig(source=sources.Digits(), tokenizer=tokenizers.Bytes())
    (problem,) = problems(config_lib.Config(data=data))
    assert problem == (
        "config.data.source=Digits: is no source of text; choose one of "
        "moe_jax.data.sources"
    )


def test_json_round_trip():
    data = ImageDataConfig(source=sources.Idx(images="a", labels="b"), flip=True)
    config = config_lib.Config(data=data)
    assert config_json.from_json(config_json.to_json(config)) == config


def test_models_of_text_refuse_images_in_one_message():
    config = config_lib.Config(
        model=Decoder(attention=Splash()),
        objective=NextToken(),
        data=ImageDataConfig(source=sources.Digits()),
        eval=config_lib.EvalConfig(baselines=True),
    )
    with pytest.raises(UserError) as error:
        config_lib.validate(config)
    assert str(error.value) == (
        "1 problem in the config:\n"
        "  --config.data=ImageDataConfig holds images, but config.model=Decoder and "
        "objective=NextToken needs text; change one of them"
    )


@config_lib.node
class Patches(config_lib.ModelConfig):
    """A model of images, of four positions a pixel."""

    data_kind = "images"

    def positions(self, data):
        return 4 * data.image_size**2


def test_positions_of_images_are_the_models():
    data = ImageDataConfig(source=sources.Digits(), image_size=8)
    config = config_lib.Config(model=Patches(), data=data, eval=ImageEvalConfig())
    assert config.positions() == 256
    options = Splash()
    assert list(options.problems("config.model.attention", config)) == []
    data.image_size = 5
    (problem,) = options.problems("config.model.attention", config)
    assert "Splash takes multiples of 128 positions on a shard, but 100" in problem
    config.mesh.context = 3
    with pytest.raises(UserError, match="the 100 positions of a row is not divisible"):
        config_lib.validate(config)
    config.data = config_lib.DataConfig(sequence_length=33)
    assert config.positions() == 33
    config.data, config.model = data, None
    assert config.positions() == 0


def test_an_evaluation_of_text_is_refused():
    data = ImageDataConfig(source=sources.Digits())
    config = config_lib.Config(model=Patches(), data=data)
    with pytest.raises(UserError, match=r"set eval to ImageEvalConfig\(\) for images"):
        config_lib.validate(config)
    config = config_lib.Config(eval=ImageEvalConfig())
    with pytest.raises(UserError, match="ImageEvalConfig evaluates images"):
        config_lib.validate(config)


def test_commands_that_need_text():
    config = config_lib.Config(data=ImageDataConfig(source=sources.Digits()))
    with pytest.raises(
        UserError, match=r"moe-jax generate needs text, and config\.data="
    ):
        config_lib.require_kind(config, "text", "moe-jax generate")
    config_lib.require_kind(config, "images", "this")
