"""A hash of the source that a module depends on, so that no result outlives its algorithm.

Follows `import` statements through our own packages only, by reading the files, without running
them. Adding a method file therefore changes the hash of no other method. A package's
`__init__.py` counts where something is imported from it, not where it is merely passed through. A
module that names the folder "native" depends on the C sources there. Comments and docstrings of
Python do not count: a method's text may cite the records that it made.
"""

import ast
import hashlib
import io
import tokenize
from collections.abc import Iterable
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("compress", "baselines", "bench", "results")


def source_hash(files: Iterable[Path], alone: Iterable[Path] = ()) -> str:
    """12 hex digits over `files` and every file of ours that they import, directly or not.

    alone: files that count by themselves, without what they import.
    """
    seen = {file.resolve() for file in alone}
    waiting = [file.resolve() for file in files]
    while waiting:
        file = waiting.pop()
        if file not in seen:
            seen.add(file)
            waiting.extend(_imports(file))
    digest = hashlib.sha256()
    for file in sorted(seen):
        name = file.relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else file.name
        digest.update(f"{name} {hashlib.sha256(meaning(file)).hexdigest()}\n".encode())
    return digest.hexdigest()[:12]


def meaning(file: Path) -> bytes:
    """What counts of `file`: of Python, the lines without comments, docstrings and empty lines."""
    content = file.read_bytes()
    if file.suffix != ".py":
        return content
    text = content.decode()
    lines: list[str | None] = list(text.splitlines())
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            before = str(lines[row - 1])[:column].rstrip()
            lines[row - 1] = before or None
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            said = node.body[0]
            for row in range(said.lineno - 1, said.end_lineno or said.lineno):
                lines[row] = None
    return "\n".join(line for line in lines if line).encode()


def module_file(module: str) -> Path | None:
    """The source file of a module of ours, or None."""
    if module.split(".")[0] not in PACKAGES:
        return None
    place = ROOT.joinpath(*module.split("."))
    candidates = (place.with_suffix(".py"), place / "__init__.py")
    return next((file for file in candidates if file.is_file()), None)


@cache
def _imports(file: Path) -> list[Path]:
    if file.suffix != ".py":
        return []
    modules: list[str] = []
    found: list[Path | None] = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:  # a name in a package is a submodule or part of __init__
                submodule = module_file(f"{node.module}.{alias.name}")
                found.append(submodule or module_file(node.module))
        elif isinstance(node, ast.Constant) and node.value == "native":
            found += sorted((file.parent / "native").glob("*.[ch]"))
    found += [module_file(module) for module in modules]
    return [source for source in found if source]
