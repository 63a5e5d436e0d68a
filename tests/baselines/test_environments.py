"""Environments: made once, resumed, outdated, broken, refused, removed; the command line."""

import json
import platform
import subprocess
import sys

import pytest
from fake_wheel import ABOUT, wheel

from baselines import __main__ as cli
from bench import environments
from bench.environments import Environment, SetupFailed
from bench.errors import UsageError


@pytest.fixture
def own_home(tmp_path, monkeypatch):
    """Requirements and cache of a single test."""
    monkeypatch.setattr(environments, "REQUIREMENTS", tmp_path / "envs")
    monkeypatch.setenv("SLIMBENCH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "envs").mkdir()
    return tmp_path


def require(home, *lines, about=ABOUT):
    (home / "envs" / "fakepeer.txt").write_text(about + "\n".join(lines) + "\n")
    return Environment("fakepeer")


def test_ready(ready, capsys):
    assert ready.state() == "ready"
    assert environments.python_of("fakepeer") == ready.python
    assert environments.installed(ready)["fakepeer"] == "1.0"
    made = json.loads((ready.folder / "ready.json").read_text())
    assert made["packages"]["fakepeer"] == "1.0"
    said = []
    environments.setup(ready, said.append)
    assert said == ["fakepeer: ready"]
    cli.app(["list"], standalone_mode=False)
    assert "fakepeer         ready" in capsys.readouterr().out
    cli.app(["doctor"], standalone_mode=False)
    assert capsys.readouterr().out == "fakepeer         ready\n"


def test_stopped_setup_goes_on_and_a_changed_file_starts_anew(own_home):
    gone = own_home / "gone-1.0-py3-none-any.whl"
    environment = require(own_home, "--no-index", str(gone))
    assert environment.state() == "missing"
    with pytest.raises(SetupFailed, match=r"installing: .*gone-1\.0"):
        environments.setup(environment, lambda line: None)
    assert environment.state() == "incomplete"
    with pytest.raises(FileNotFoundError, match="incomplete; run: python -m baselines setup fakep"):
        environments.python_of("fakepeer")
    mark = environment.folder / "mark"
    mark.touch()
    environment = require(own_home, "--no-index", str(wheel(own_home, "1.0")))
    environments.setup(environment, lambda line: None)
    assert mark.exists() and environment.state() == "ready", "it went on in the same venv"

    environment = require(own_home, "--no-index", str(wheel(own_home, "2.0")))
    assert environment.state() == "outdated"
    environments.setup(environment, lambda line: None)
    assert not mark.exists() and environments.installed(environment)["fakepeer"] == "2.0"

    require(
        own_home, "# another comment", "--no-index", str(own_home / "fakepeer-2.0-py3-none-any.whl")
    )
    assert environment.state() == "ready", "comments install nothing"
    environment.python.unlink()
    assert environment.state() == "broken"
    assert environments.remove(environment) > 0
    assert environment.state() == "missing" and environments.remove(environment) == 0


def test_a_library_that_does_not_import_is_not_ready(own_home):
    made = wheel(own_home, "1.0")
    about = ABOUT.replace("import: fakepeer", "import: fakepeer.missing")
    environment = require(own_home, "--no-index", str(made), about=about)
    with pytest.raises(SetupFailed, match=r"importing fakepeer.missing, bench.worker: ModuleNotF"):
        environments.setup(environment, lambda line: None)
    assert environment.state() == "incomplete"


def test_modules_beside_the_caller_are_not_seen(ready, tmp_path, monkeypatch):
    (tmp_path / "stray_module.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    code = "import importlib.util as u; print(u.find_spec('stray_module'))"
    assert environments._run("looking", [str(ready.python), "-c", code]).strip() == "None"


def test_an_unfinished_environment_needs_only_the_rest_of_its_disk(own_home, monkeypatch):
    environment = require(own_home, about=ABOUT.replace("0.1 GB", "2 GB"))
    monkeypatch.setattr(environments, "free_bytes", lambda place: 10**9)
    monkeypatch.setattr(environments, "folder_bytes", lambda place: 12 * 10**8)
    environments._check_disk(environment, 0)
    with pytest.raises(SetupFailed, match="needs about 2 GB"):
        environments._check_disk(environment, environments.CUDA_BYTES)


def test_too_little_disk_is_said_before_anything_is_made(own_home):
    environment = require(own_home, about=ABOUT.replace("0.1 GB", "900000 GB"))
    with pytest.raises(SetupFailed, match="needs about 900000 GB"):
        environments.setup(environment, lambda line: None)
    assert not environment.folder.exists()


def test_an_interrupted_venv_is_made_again(own_home):
    environment = require(own_home, "--no-index", str(wheel(own_home, "1.0")))
    environment.python.parent.mkdir(parents=True)
    # Interrupted before pip came: a python that has none.
    environment.python.write_text("#!/bin/sh\necho No module named pip >&2; exit 1\n")
    environment.python.chmod(0o755)
    environments.setup(environment, lambda line: None)
    assert environment.state() == "ready"


def test_identity_follows_what_is_installed(ready, monkeypatch):
    before = ready.identity()
    made = ready.made()
    assert made["python"] == platform.python_version()
    monkeypatch.setattr(Environment, "made", lambda self: made | {"python": "3.99"})
    assert ready.identity() != before and not before.startswith("wanted")
    monkeypatch.setattr(Environment, "state", lambda self: "missing")
    assert ready.identity() == f"wanted-{ready.checksum()}"


def fake_pip(packages):
    report = {"install": [{"metadata": {"name": name}} for name in packages]}
    return [sys.executable, "-c", f"print({json.dumps(json.dumps(report))})"]


def test_a_build_for_cuda_is_refused_without_a_gpu():
    environments._check_build(fake_pip(["torch", "sympy"]), ["torch==2.13.0"], cuda=False)
    environments._check_build(fake_pip(["torch", "nvidia-cublas-cu12"]), ["torch"], cuda=True)
    with pytest.raises(SetupFailed, match=r"build of torch==2\.13\.0 for CUDA"):
        environments._check_build(
            fake_pip(["torch", "nvidia-cublas-cu12"]), ["torch==2.13.0"], cuda=False
        )


def test_command_line(own_home, capsys):
    require(own_home, "--no-index", str(own_home / "gone-1.0-py3-none-any.whl"))
    for arguments, code, message in (
        (["setup"], 2, "name environments, or give --all"),
        (["setup", "fakeper"], 2, "no environment 'fakeper'; did you mean fakepeer?"),
        (["setup", "--all"], 1, "fakepeer: failed: installing"),
        (["doctor"], 1, ""),
    ):
        with pytest.raises(SystemExit) as end:
            cli.main(arguments)
        found = capsys.readouterr()
        assert end.value.code == code and message in found.err
    assert "fakepeer         incomplete; run: python -m baselines setup fakepeer" in found.out


def test_every_environment_says_what_it_is():
    assert environments.names(), "the files are there"
    for name in environments.names():
        environment = environments.get(name)
        assert environment.about.keys() == {"about", "import", "disk"}
        assert environment.needs_bytes > 10**8
        for line in environments.requirements(environment.file):
            assert "==" in line or line.startswith("-"), f"{name}: {line} is not pinned"
        # Named itself, so that a build for CUDA is refused before it comes.
        assert any(
            line.startswith("torch==") for line in environments.requirements(environment.file)
        )


def test_unknown(own_home):
    with pytest.raises(UsageError, match="no environment 'x'"):
        environments.get("x")


def test_help():
    done = subprocess.run([sys.executable, "-m", "baselines", "--help"], capture_output=True)
    assert done.returncode == 0 and b"setup" in done.stdout
