"""Flags, config files and errors as a user meets them."""

import os
import pathlib
import subprocess
import sys
import textwrap

import pytest
from absl import flags

from moe_jax.cli import common, main
from moe_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]

BASE = """
import dataclasses
from moe_jax import config as c

@dataclasses.dataclass(slots=True, kw_only=True)
class Router(c.SelectorConfig):
    top_k: int = 2

@dataclasses.dataclass(slots=True, kw_only=True)
class Toy(c.ModelConfig):
    router: Router = dataclasses.field(default_factory=Router)
    routers: tuple[Router, ...] = ()
    capacity: float = 1.0
    use_bias: bool = False
    axes: tuple[str, ...] = ("a",)

def empty(base):
    return dataclasses.make_dataclass("E", [], bases=(base,), slots=True)()

def get_config(variant=""):
    config = c.Config(
        model=Toy(routers=(Router(), Router())),
        objective=empty(c.ObjectiveConfig),
        optimizer=empty(c.OptimizerConfig),
        schedule=empty(c.ScheduleConfig),
    )
    config.data.source = empty(c.SourceConfig)
    config.data.tokenizer = empty(c.TokenizerConfig)
    config.train.steps = {"": 10, "small": 3}[variant]
    return config
"""


@pytest.fixture
def configs(tmp_path):
    """A folder `configs` with a valid config; writes more of them by name."""
    folder = tmp_path / "repo" / "configs"
    folder.mkdir(parents=True)
    (folder / "base.py").write_text(BASE)

    def write(name, text):
        (folder / name).write_text(textwrap.dedent(text))
        return folder / name

    write.base = folder / "base.py"
    yield write
    for name in [n for n in sys.modules if n.split(".")[0] == "configs"]:
        del sys.modules[name]


@pytest.fixture
def command(capsys):
    """Runs a dummy command; returns status, its config, stdout and stderr."""

    def run(*argv, body=lambda config: None):
        seen = []

        def define_flags():
            common.define_config()
            flags.DEFINE_string("workdir", "", "Folder of the run.")

        def main():
            config = common.load_config()
            seen.append(config)
            return body(config)

        status = common.execute(main, define_flags, [str(a) for a in argv], "dummy")
        out, err = capsys.readouterr()
        return status, seen[0] if seen else None, out, err

    return run


def fails(result):
    status, config, _, err = result
    assert status == 2 and config is None
    assert "Traceback" not in err
    assert err.startswith("moe-jax dummy: error: ")
    return err


def test_overrides_convert_types(command, configs):
    status, config, _, err = command(
        f"--config={configs.base}",
        "--config.mesh.expert=4",
        "--config.model.capacity=2",
        "--config.model.use_bias",
        "--config.model.axes=('x','y')",
        "--config.model.router.top_k=3",
        "--config.model.routers[1].top_k=5",
        "--noconfig.log.tensorboard",
    )
    assert (status, err) == (0, "")
    assert config.mesh.expert == 4
    assert config.model.capacity == 2.0 and isinstance(config.model.capacity, float)
    assert config.model.use_bias is True and config.log.tensorboard is False
    assert config.model.axes == ("x", "y")
    assert config.model.router.top_k == 3
    assert [r.top_k for r in config.model.routers] == [2, 5]


def test_second_command_starts_from_the_file(command, configs):
    argument = f"--config={configs.base}"
    assert command(argument, "--config.train.steps=7")[1].train.steps == 7
    assert command(argument)[1].train.steps == 10


def test_variant(command, configs):
    assert command(f"--config={configs.base}:small")[1].train.steps == 3
    err = fails(command(f"--config={configs.base}:smal"))
    assert "base.py:" in err and "KeyError: 'smal'" in err
    plain = configs("plain.py", "def get_config(): pass")
    assert "too many positional" in fails(command(f"--config={plain}:small"))


@pytest.mark.parametrize(
    "override, expected",
    [
        ("--config.trian.steps=3", "--config.trian: no such key; did you mean "),
        ("--config.trian.steps=3", "did you mean --config.train?"),
        ("--config.model.router.topk=3", "did you mean --config.model.router.top_k?"),
        ("--config.model.router.topk=3", "(keys there: top_k)"),
        ("--config.model.routers[2].top_k=3", "config.model.routers has 2 entries"),
        ("--config.seed.x=3", "config.seed=0 has no key 'x'"),
        ("--config.mesh.expert=two", "--config.mesh.expert=two: invalid literal"),
        ("--config.mesh.expert=2.5", "--config.mesh.expert=2.5: invalid literal"),
        ("--config.model=3", "a flag cannot choose a class"),
        ("--config.train.steps", "Missing value for flag --config.train.steps"),
        ("--workdr=x", "--workdr: no such flag; did you mean --workdir?"),
        ("stray", "unexpected argument 'stray'"),
        ("--config.train.steps=0", "--config.train.steps=0: must be at least 1"),
    ],
)
def test_mistakes_in_flags(command, configs, override, expected):
    assert expected in fails(command(f"--config={configs.base}", override))


def test_config_flag_missing_or_late(command, configs):
    assert "--config is missing" in fails(command())
    assert "needs --config=FILE" in fails(command("--config.seed=3"))
    late = fails(command("--config.seed=3", f"--config={configs.base}"))
    assert "before a value for --config" in late
    assert "did you mean 'base.py'" in fails(
        command(f"--config={configs.base.parent}/bse.py")
    )


@pytest.mark.parametrize(
    "text, expected",
    [
        (
            """
            from configs import base
            def get_config():
                config = base.get_config()
                config.train.step = 5
                return config
            """,
            "bad.py:5: AttributeError: 'TrainConfig' object has no attribute 'step'; "
            "did you mean 'steps'?",
        ),
        (
            """
            from moe_jax import config
            def get_config():
                return config.Config(sed=3)
            """,
            "'sed'; did you mean 'seed'?",
        ),
        ("def get_config(:", "bad.py:1: SyntaxError"),
        ("x = 1 / 0", "bad.py:1: ZeroDivisionError"),
        ("get_conf = 1", "the file has no function get_config()"),
        ("def get_config(): pass", "get_config() returned NoneType"),
        (
            """
            from configs import base
            def get_config():
                config = base.get_config()
                config.train.steps = "many"
                config.model.use_bias = 1
                return config
            """,
            "--config.train.steps='many': must be of type int, not str",
        ),
    ],
)
def test_mistakes_in_the_file(command, configs, text, expected):
    path = configs("bad.py", text)
    assert expected in fails(command(f"--config={path}"))


def test_sibling_from_another_folder(command, configs, tmp_path, monkeypatch):
    # Another folder `configs`, in the working directory and first on the path, must
    # not answer for the one beside the file; nor a file of a well-known name.
    other = tmp_path / "other"
    (other / "configs").mkdir(parents=True)
    (other / "configs" / "base.py").write_text("raise RuntimeError('wrong one')")
    (configs.base.parents[1] / "colorsys.py").write_text("raise RuntimeError")
    monkeypatch.chdir(other)
    monkeypatch.syspath_prepend(str(other))
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    child = configs(
        "child.py",
        """
        import colorsys
        from configs import base
        def get_config():
            config = base.get_config()
            config.seed = 11
            return config
        """,
    )
    relative = os.path.relpath(child, other)
    assert command(f"--config={relative}")[1].seed == 11


def test_statuses(command, configs):
    argument = f"--config={configs.base}"

    def raises(error):
        def body(config):
            raise error

        return body

    assert command(argument, body=lambda config: 1)[0] == 1
    assert command(argument, body=raises(UserError("no disk")))[3].endswith("no disk\n")
    status, _, _, err = command(argument, body=raises(KeyError("bug")))
    assert status == 1 and "Traceback" in err
    assert command(argument, body=raises(KeyboardInterrupt()))[0] == 130


def test_a_command_for_one_process_refuses_several(command, configs, monkeypatch):
    monkeypatch.setenv("MOE_JAX_COORDINATOR", "127.0.0.1:1")
    monkeypatch.setenv("MOE_JAX_PROCESS_ID", "0")
    monkeypatch.setenv("MOE_JAX_NUM_PROCESSES", "1")
    assert command(f"--config={configs.base}")[0] == 0
    monkeypatch.setenv("MOE_JAX_NUM_PROCESSES", "3")
    result = command(f"--config={configs.base}")
    fails(result)
    assert "for one process, and 3 were started (found by flags)" in result[3]


@pytest.mark.parametrize("index, said", [(0, "6/6 images\n"), (1, "")])
def test_notes_come_from_the_first_process(capsys, monkeypatch, index, said):
    monkeypatch.setattr("jax.process_index", lambda: index)
    common.note("6/6 images")
    assert capsys.readouterr() == ("", said)


def test_help_shows_docstring_and_flags(command):
    status, _, out, _ = command("--help", "--nonsense")
    assert status == 0
    assert "as a user meets them" in out  # of this module
    assert "--workdir=..." in out and "Folder of the run." in out


def run_python(*arguments, cwd):
    env = dict(os.environ, PYTHONPATH=str(ROOT), JAX_PLATFORMS="cpu")
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_misspelt_key_answers_soon(configs, tmp_path):
    """Before JAX is loaded, which takes seconds."""
    script = tmp_path / "dummy.py"
    script.write_text(
        '"""Dummy."""\n'
        "import atexit, sys\n"
        "from moe_jax.cli import common\n"
        "atexit.register(lambda: print('jax' in sys.modules))\n"
        "def main():\n    import jax\n    common.load_config()\n"
        'if __name__ == "__main__":\n    common.run(main, common.define_config)\n'
    )
    result = run_python(
        script, f"--config={configs.base}", "--config.sed=1", cwd=tmp_path
    )
    assert (result.returncode, result.stdout) == (2, "False\n")
    assert result.stderr.startswith("moe-jax dummy: error: --config.sed: no such key")
    result = run_python(
        script, f"--config={configs.base}", "--config.seed=1", cwd=tmp_path
    )
    assert (result.returncode, result.stdout) == (0, "True\n")


def test_dispatcher(capsys):
    assert main.main(["trian"]) == 2
    assert "did you mean 'train'?" in capsys.readouterr().err
    assert main.main(["--version"]) == 0
    assert main.main([]) == 2


def test_dispatcher_help_imports_no_jax(tmp_path):
    code = (
        "import sys; from moe_jax.cli import main; assert main.main(['--help']) == 0\n"
        "assert 'jax' not in sys.modules and 'absl' not in sys.modules"
    )
    result = run_python("-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for name in main.COMMANDS:
        assert f"  {name} " in result.stdout
