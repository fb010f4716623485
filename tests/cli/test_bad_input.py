"""Mistakes of a user: status 2, one message, no stack trace."""

import importlib
import json
import pathlib

import jax
import pytest

from moe_jax.checkpoint import Checkpoints
from moe_jax.cli import common, config_file
from moe_jax.train import workdir

TINY = pathlib.Path(__file__).parents[1] / "end_to_end" / "tiny.py"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("one line of text\n" * 200)
    return path


@pytest.fixture
def fails(capsys):
    """Runs a command that must fail; returns its message."""

    def run(name, *argv):
        module = importlib.import_module(f"moe_jax.cli.{name}")
        argv = [str(a) for a in argv]
        status = common.execute(module.main, module.define_flags, argv, name)
        out, err = capsys.readouterr()
        assert status == 2, err
        assert err.startswith(f"moe-jax {name}: error: ")
        assert "Traceback" not in out + err
        assert err.count("error: ") == 1
        return err

    return run


@pytest.fixture
def train_fails(fails, tmp_path, text):
    """Runs train on eight devices, with its text, and the given changes."""

    def run(*changes, config=TINY, folder=tmp_path / "run"):
        return fails(
            "train",
            f"--config={config}",
            f"--workdir={folder}",
            f"--config.data.source.path={text}",
            f"--config.data.folder={tmp_path / 'cache'}",
            "--config.data.workers=1",
            *changes,
        )

    return run


@pytest.mark.parametrize(
    "changes, message",
    [
        (["--config.train.stepz=3"], "did you mean --config.train.steps?"),
        (["--config.modle.d_model=3"], "did you mean --config.model?"),
        (["--wokdir=x"], "--wokdir: no such flag; did you mean --workdir?"),
        (["--workdir="], "--workdir is missing"),
        (
            ["--config.train.batch_size=7"],
            "batch_size / accumulation = 7 is not divisible by data * fsdp * expert "
            "= 2 of config.mesh; set batch_size to a multiple of 2",
        ),
        (
            ["--config.train.batch_size=4"],
            "= 4 rows cannot be split over 8 shards (data * fsdp * expert on 8 "
            "devices); set batch_size to a multiple of 8",
        ),
        (["--config.train.accumulation=3"], "accumulation=3; it takes one of [1, 2"),
        (
            ["--config.mesh.expert=3"],
            "num_experts=4 is not divisible by config.mesh.expert=3; expert takes "
            "one of [1, 2, 4]",
        ),
        (
            ["--config.mesh.data=8", "--config.train.batch_size=16"],
            "--config.mesh needs 16 devices (data=8 * fsdp=1 * expert=2 * context=1 "
            "* tensor=1) but there are 8",
        ),
        (["--config.mesh.data=-2"], "config.mesh.data=-2: must be at least 1 or -1"),
        (
            ["--config.model.num_heads=5"],
            "d_model=32 is not divisible by config.model.num_heads=5; num_heads takes "
            "one of [1, 2, 4, 8, 16, 32]",
        ),
        (
            ["--config.model.feed_forward.selector.top_k=5"],
            "selector.top_k=5 is more than config.model.feed_forward.num_experts=4",
        ),
        (["--config.data.source.path=/no/text"], "path='/no/text' does not exist"),
        (
            ["--config.model.vocab_size=200"],
            "vocab_size=200 is smaller than the tokenizer's 258 ids; set it to 258 "
            "or, for even tiles, 384",
        ),
        (
            ["--config.train.warm_start=/no/run"],
            "--workdir=/no/run: no config.json there",
        ),
        (["--config.schedule.warmup_steps=61"], "warmup_steps=61: must lie in"),
        (["--config.train.nan_policy=ignore"], "must be 'skip' or 'stop'"),
    ],
)
def test_train(train_fails, changes, message):
    assert message in train_fails(*changes)


def test_train_without_a_config(fails, tmp_path):
    assert "--config is missing" in fails("train", f"--workdir={tmp_path}")


def test_all_problems_at_once(train_fails):
    message = train_fails("--config.train.steps=0", "--config.model.num_heads=5")
    assert message.splitlines()[0].endswith("4 problems in the config:")
    assert "--config.train.steps=0" in message
    assert "--config.model.d_model=32 is not divisible" in message
    assert "--config.model.num_heads=5 is not divisible" in message
    assert "--config.schedule.warmup_steps=5" in message


@pytest.mark.parametrize(
    "content, message",
    [("", "every file there is empty"), ("ab", "less than one row")],
)
def test_train_with_too_little_text(train_fails, text, content, message):
    text.write_text(content)
    assert message in train_fails()


def test_train_with_an_unwritable_workdir(train_fails, text):
    message = train_fails(folder=text / "run")
    assert str(text / "run") in message and "Not a directory" in message


def with_tokenizer(folder, path):
    """A config with a Hugging Face tokenizer."""
    config = folder / "with_tokenizer.py"
    config.write_text(
        "import importlib.util\n"
        "from moe_jax.data.tokenizers import HuggingFaceTokenizer\n"
        f"spec = importlib.util.spec_from_file_location('tiny', {str(TINY)!r})\n"
        "tiny = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(tiny)\n"
        "def get_config():\n"
        "    config = tiny.get_config()\n"
        f"    config.data.tokenizer = HuggingFaceTokenizer(path={str(path)!r})\n"
        "    return config\n"
    )
    return config


def test_train_with_a_missing_or_damaged_tokenizer(train_fails, tmp_path):
    path = tmp_path / "tokenizer.json"
    config = with_tokenizer(tmp_path, path)
    assert "cannot read it (No such file" in train_fails(config=config)
    path.write_text("{}")
    assert "is no tokenizer.json" in train_fails(config=config)


def test_train_on_bytes_that_are_no_text(train_fails, tmp_path, text):
    tokenizers = pytest.importorskip("tokenizers")
    words = {"one": 0, "line": 1, "of": 2, "text": 3, "?": 4}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    text.write_bytes(b"one line of text\n" * 200 + b"\xff\xfe" + b"of text\n" * 200)
    config = with_tokenizer(tmp_path, tmp_path / "tokenizer.json")
    message = train_fails("--config.data.validation_fraction=0", config=config)
    assert "'text.txt' is not UTF-8 at byte 3400 (0xff)" in message
    assert "Bytes()" in message


def test_train_in_the_workdir_of_another_model(train_fails, tmp_path, text):
    config = config_file.load(str(TINY))
    config.data.source.path = str(text)
    workdir.claim(str(tmp_path / "run"), config)
    checkpoints = Checkpoints(str(tmp_path / "run" / "checkpoints"), config.checkpoint)
    checkpoints.save(3, {"x": jax.numpy.ones(2)}, {}, force=True)
    checkpoints.close()
    before = (tmp_path / "run" / "config.json").read_text()
    message = train_fails("--config.model.num_layers=4")
    assert "holds another model" in message
    assert "config.model.num_layers: 2 -> 4" in message
    assert "saw its examples in another order" in train_fails("--config.seed=1")
    assert (tmp_path / "run" / "config.json").read_text() == before


@pytest.mark.parametrize("name", ["eval", "generate"])
def test_no_run(fails, tmp_path, name):
    assert "--workdir is missing" in fails(name)
    empty = fails(name, f"--workdir={tmp_path}")
    assert f"--workdir={tmp_path}: no config.json there" in empty
    assert "no config.json" in fails(name, f"--workdir={tmp_path / 'nowhere'}")


@pytest.fixture
def untrained(tmp_path, text):
    """A workdir whose run saved nothing yet."""
    config = config_file.load(str(TINY))
    config.data.source.path = str(text)
    config.data.folder = str(tmp_path / "cache")
    config.data.workers = 1
    folder = tmp_path / "untrained"
    workdir.claim(str(folder), config)
    return folder


@pytest.mark.parametrize(
    "name, flag, message",
    [
        ("eval", "--step=0", "there is no checkpoint yet"),
        ("generate", "--step=0", "there is no checkpoint yet"),
        ("eval", "--step=7", "no step 7"),
        ("eval", "--step=-1", "--step=-1"),
        ("eval", "--mesh=foo=2", "no axis 'foo'"),
        ("generate", "--mesh=exprt=2", "no axis 'exprt'; did you mean 'expert'?"),
        ("generate", "--mesh=expert=two", "expert='two' is not a size"),
        ("generate", "--mesh=expert=3", "num_experts=4 is not divisible"),
        ("generate", "--mesh=expert=4", "--config.mesh needs 4 devices"),
        ("generate", "--top_p=0", "--top_p=0.0: must lie in (0, 1]"),
        ("generate", "--top_p=1.5", "--top_p=1.5"),
        ("generate", "--temperature=-1", "--temperature=-1"),
        ("generate", "--tokens=0", "--tokens=0"),
    ],
)
def test_eval_and_generate(fails, untrained, name, flag, message):
    assert message in fails(name, f"--workdir={untrained}", flag)
    assert not (untrained / "checkpoints").exists(), "reading makes nothing"


@pytest.mark.parametrize(
    "keys, value, message",
    [
        ("train.steps", "many", "config.train.steps='many': must be of type int"),
        ("train.steps", None, "config.train.steps=None: must be of type int"),
        ("train.steps", True, "config.train.steps=True: must be of type int"),
        ("model.feed_forward.selector.top_k", [2], "=(2,): must be of type int"),
        ("mesh", 3, "config.mesh=3: must be of type MeshConfig, not int"),
        ("data.source", "x", "config.data.source='x': must be of type SourceConfig"),
        ("data.source", None, "config.data.source is not set"),
        ("train.steps", 0, "config.train.steps=0: must be at least 1"),
    ],
)
def test_a_broken_saved_config(fails, untrained, keys, value, message):
    data = json.loads((untrained / "config.json").read_text())
    *above, last = keys.split(".")
    inner = data
    for key in above:
        inner = inner[key]
    inner[last] = value
    (untrained / "config.json").write_text(json.dumps(data))
    assert message in fails("eval", f"--workdir={untrained}")


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--mesh=foo=2", "no axis 'foo'"),
        ("--mesh=expert=0", "expert='0' is not a size"),
        ("--mesh=expert", "expert='' is not a size"),
    ],
)
def test_check(fails, flag, message):
    assert message in fails("check", f"--config={TINY}", flag)


@pytest.fixture
def image_run(tmp_path):
    """A config file of a model of text whose data are images."""
    path = tmp_path / "images.py"
    path.write_text(
        "from moe_jax.cli import config_file\n"
        "from moe_jax.data.images.config import ImageDataConfig\n"
        "from moe_jax.data.images.sources import Digits\n"
        "def get_config():\n"
        f"    config = config_file.load({str(TINY)!r})\n"
        "    config.data = ImageDataConfig(source=Digits())\n"
        "    return config\n"
    )
    return path


def test_a_model_of_text_refuses_images(fails, image_run, tmp_path):
    argv = f"--config={image_run}", f"--workdir={tmp_path / 'run'}"
    message = fails("train", *argv, "--config.data.image_size=8")
    assert "config.data=ImageDataConfig holds images, but config.model=" in message
    message = fails("train", *argv, "--config.data.sequence_length=8")
    assert "--config.data.sequence_length: no such key" in message
    assert "holds images" in fails("bench.data", argv[0])


def test_generate_refuses_images(fails, image_run, monkeypatch):
    """Also the run of a model that takes them."""
    config = config_file.load(str(image_run))
    monkeypatch.setattr(common, "read_workdir_config", lambda: config)
    message = fails("generate", "--workdir=run")
    assert "moe-jax generate needs text, and config.data=ImageDataConfig" in message
