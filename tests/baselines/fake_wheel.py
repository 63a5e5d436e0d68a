"""The wheel of a library for tests: no network is asked for it."""

import sysconfig
import zipfile
from pathlib import Path

HOME = Path(__file__).parent / "fake_peer"
ABOUT = "# about: a library for tests\n# import: fakepeer\n# disk: 0.1 GB\n"


def wheel(folder: Path, version: str) -> Path:
    """A wheel of the library and its adapter. torch comes from the interpreter of the tests."""
    file = folder / f"fakepeer-{version}-py3-none-any.whl"
    info = f"fakepeer-{version}.dist-info"
    contents = {
        str(path.relative_to(HOME / part)): path.read_text()
        for part in ("library", "adapters")
        for path in sorted((HOME / part).rglob("*.py"))
    }
    contents["parents.pth"] = sysconfig.get_paths()["purelib"] + "\n"
    contents[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: fakepeer\nVersion: {version}\n"
    contents[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    names = [*contents, f"{info}/RECORD"]
    contents[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in names)
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in contents.items():
            archive.writestr(name, text)
    return file
