"""Adapters, without their libraries: found, named, in an environment that there is; refusals."""

import subprocess
import sys
from dataclasses import replace

import pytest

from bench import environments
from bench.run import GROUPS, METHOD_PACKAGES
from compress import registry


def found_by_the_bench():
    """Name -> adapter; forgotten again, or tests of every method would want their libraries."""
    before = set(registry.names())
    registry.discover(*METHOD_PACKAGES)
    added = {name: registry.get(name) for name in set(registry.names()) - before}
    mine = {n: p for n, p in added.items() if type(p).__module__.startswith(GROUPS["peers"])}
    for name in mine:
        del registry._METHODS[name]
    for module in [name for name in sys.modules if name.startswith(f"{GROUPS['peers']}.")]:
        del sys.modules[module]
    return mine


PEERS = found_by_the_bench()


def test_there_are_some():
    assert {"torchao:int8", "torchao:int8_dynamic", "torchao:int4"} <= PEERS.keys()


@pytest.mark.parametrize("name", sorted(PEERS))
def test_a_peer_names_its_library_and_its_environment(name):
    peer = PEERS[name]
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
        replace(PEERS["torchao:int8"], kind="int3")
