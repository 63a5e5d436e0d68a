"""source_hash: follows our imports, ignores siblings, changes with any byte that matters."""

import pytest

from bench import source_hash as module
from bench.source_hash import source_hash


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """compress/methods/{one,two}.py; one imports base by name, base imports maths in a function."""
    monkeypatch.setattr(module, "ROOT", tmp_path)
    files = {
        "compress/__init__.py": "from compress.methods import two\n",
        "compress/methods/__init__.py": "",
        "compress/methods/one.py": "import os\nfrom compress import base\n",
        "compress/methods/two.py": "from compress.base import thing\n",
        "compress/base.py": "def f():\n    from compress.maths import g\n",
        "compress/maths.py": "import compress.base, compress.rounding\n",
        "compress/rounding.py": 'FOLDER = "native"\n',
        "compress/native/rows.c": "int rows;\n",
        "compress/native/rows.h": "",
        "compress/native/README": "",
        "bench/metrics/__init__.py": "from bench.metrics.size import size\nMETRICS = 1\n",
        "bench/metrics/size.py": "size = 1\n",
        "bench/worker.py": "from bench.metrics import METRICS\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


CASES = {  # changed file -> does the hash of compress/methods/one.py change?
    "compress/methods/one.py": True,
    "compress/base.py": True,
    "compress/maths.py": True,
    "compress/rounding.py": True,
    "compress/native/rows.c": True,
    "compress/native/rows.h": True,
    "compress/native/README": False,
    "compress/methods/two.py": False,
    "compress/__init__.py": False,
    "bench/worker.py": False,
}


@pytest.mark.parametrize("changed", CASES)
def test_follows_imports_and_nothing_else(tree, changed):
    method = tree / "compress/methods/one.py"
    before = source_hash([method])
    with (tree / changed).open("a") as file:
        file.write("another = 1;\n")
    assert (source_hash([method]) != before) == CASES[changed]


def test_comments_and_docstrings_do_not_count(tree):
    method = tree / "compress/methods/one.py"
    code = "def f():\n    return '# no comment'\n"
    method.write_text(code)
    before = source_hash([method])
    for same in (
        f'"""What it is for,\n\nin lines."""\n\n{code}',
        "# why\ndef f():  # how\n    return '# no comment'\n",
        "def f():\n    'About.'\n\n    return '# no comment'\n",
    ):
        method.write_text(same)
        assert source_hash([method]) == before
    for other in (code.replace("no ", ""), f"{code}'a string alone'\n", code.replace("f()", "g()")):
        method.write_text(other)
        assert source_hash([method]) != before


def test_a_name_from_a_package_brings_its_init(tree):
    before = source_hash([tree / "bench/worker.py"])
    (tree / "bench/metrics/size.py").write_text("size = 2\n")
    assert source_hash([tree / "bench/worker.py"]) != before


def test_alone_means_without_imports(tree):
    before = source_hash([], alone=[tree / "bench/worker.py"])
    (tree / "bench/metrics/size.py").write_text("size = 2\n")
    assert source_hash([], alone=[tree / "bench/worker.py"]) == before
    (tree / "bench/worker.py").write_text("pass\n")
    assert source_hash([], alone=[tree / "bench/worker.py"]) != before


def test_is_12_hex_digits_and_independent_of_where_the_checkout_lies(tree, tmp_path_factory):
    value = source_hash([tree / "compress/maths.py", tree / "compress/base.py"])
    assert len(value) == 12 and int(value, 16) >= 0
    assert value == source_hash([tree / "compress/base.py"])  # which imports maths
