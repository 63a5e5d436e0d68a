"""The rules that keep this repository small, checked instead of remembered."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {  # package -> which of our other packages it may import
    "results": set(),
    "compress": set(),
    "baselines": {"compress"},  # and bench, in the command line only
    "bench": {"compress", "results"},  # finds peers as it finds methods: by the package's name
    "tokenizers_lab": {"results"},
    "finetune": {"bench", "compress", "results"},  # whose models the bench meets as folders only
}
FILES = sorted(file for package in MAY_IMPORT for file in (ROOT / package).rglob("*.py"))
MODULES = [file for file in FILES if file.name != "__init__.py"]
METHODS = [file for file in MODULES if file.parent.name in ("methods", "adapters")]


def name(file: Path) -> str:
    return str(file.relative_to(ROOT))


def imported_packages(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{name(file)}: use absolute imports"
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("file", FILES, ids=name)
def test_imports_point_down(file):
    package = file.relative_to(ROOT).parts[0]
    ours = imported_packages(file) & MAY_IMPORT.keys()
    more = {"bench"} if name(file) == "baselines/__main__.py" else set()
    assert ours <= MAY_IMPORT[package] | {package} | more


@pytest.mark.parametrize("file", MODULES, ids=name)
def test_module_is_short_and_says_what_it_is(file):
    text = file.read_text()
    assert ast.get_docstring(ast.parse(text)), "a module starts with a docstring"
    assert len(text.splitlines()) <= 300


@pytest.mark.parametrize("file", METHODS, ids=name)
def test_method_names_its_source_and_registers_itself(file):
    text = file.read_text()
    assert "Source: " in (ast.get_docstring(ast.parse(text)) or "") and "https://" in text
    assert "\nregister(" in text


@pytest.mark.parametrize("file", FILES, ids=name)
def test_nothing_unpickles_or_trusts_remote_code(file):
    text = file.read_text()
    for forbidden in (
        "trust_remote_code=True",
        "torch.load(",
        "pickle.load",
        "shell=True",
        "eval(",
    ):
        assert forbidden not in text.replace(".eval()", "").replace("literal_eval(", "")
