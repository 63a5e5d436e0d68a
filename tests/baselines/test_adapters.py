"""Adapters, without their libraries: found, named, in an environment that there is; refusals."""

import subprocess
import sys
from dataclasses import replace

import pytest

from bench import environments
from bench.run import GROUPS, METHOD_PACKAGES
from compress import registry

registry.discover(*METHOD_PACKAGES)
PEERS = [
    n for n in registry.names() if type(registry.get(n)).__module__.startswith(GROUPS["peers"])
]


def test_there_are_some():
    assert {"torchao:int8", "torchao:int8_dynamic", "torchao:int4"} <= set(PEERS)


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_names_its_library_and_its_environment(name):
    peer = registry.get(name)
    library, _, method = name.partition(":")
    assert library == type(peer).__module__.rpartition(".")[2] and method
    assert peer.env in environments.names()
    wanted = environments.requirements(environments.get(peer.env).file)
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in wanted}
    assert peer.libraries and {each.lower() for each in peer.libraries} <= pinned


def test_finding_adapters_imports_no_library():
    code = (
        "import sys; from compress import registry; registry.discover('baselines.adapters'); "
        "print(sorted(n for n in sys.modules if n in {'torchao', 'transformers', 'datasets'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip().endswith("[]"), done.stderr or done.stdout


def test_refusals():
    with pytest.raises(ValueError, match="kind must be int8, int8_dynamic or int4, not 'int3'"):
        replace(registry.get("torchao:int8"), kind="int3")
