"""What others have made, read as it is: `file`, written `file:PATH`.

A GGUF file, or a folder in any format of `compress.export`, becomes an artefact like those of our
own methods: its very bytes, scored through our layers with its codes kept as codes. Nothing is
compressed here, and nothing is converted.

Source: the formats, each named in its file of `compress/export`;
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md is GGUF's
"""

import hashlib
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor

from compress.base import Compressor, Progress, Runner, TorchRunner, silent
from compress.export import format_of, read
from compress.model_files import CONFIG, read_json
from compress.registry import register

# Tensors, settings, tokenizers. Others' folders may hold pickles and code too: those stay there.
WANTED = (".safetensors", ".gguf", ".json", ".model", ".txt", ".jinja")


@dataclass(frozen=True)
class File(Compressor):
    """The artefact at `path`, a file or folder.

    sha256: of its content, or "" for whatever is there when the job is planned; of a folder, over
    the names and checksums of its files. format: one of compress.export, "" for what it is.
    """

    foreign: ClassVar[bool] = True
    takes: ClassVar[tuple[str, ...]] = ()

    path: str = ""
    sha256: str = ""
    format: str = ""

    def pinned(self) -> Self:
        """With checksum and format. Raises ValueError for a path that holds nothing to read."""
        if not self.path:
            raise ValueError("file needs a path: file:PATH, a GGUF file or a folder")
        found = format_of(self.place)
        if self.format not in ("", found):
            raise ValueError(f"{self.path} is in the format {found}, not {self.format!r}")
        sha256 = checksum(self.place)
        if self.sha256 not in ("", sha256):
            raise ValueError(f"{self.path} has the sha256 {sha256}, not {self.sha256}")
        return replace(self, sha256=sha256, format=found)

    @property
    def place(self) -> Path:
        """Where it lies."""
        return Path(os.path.expanduser(self.path))

    def read(self, folder: Path) -> Path:
        """The artefact's place, its content read once and found to be of the parent's vocabulary.

        folder: the parent's. Raises ValueError, naming the file, for what cannot be used.
        """
        self.pinned()  # the content is still what the job's key speaks of
        known, wanted = (
            read(self.place).config.vocab_size,
            read_json(folder / CONFIG).get("vocab_size"),
        )
        if known != wanted:
            raise ValueError(f"{self.path} knows {known} tokens, the parent model {wanted}")
        return self.place

    def compress(
        self, model: Any, calibration: Tensor | None = None, progress: Progress = silent
    ) -> Any:
        """The place that `read` gave: there is nothing to do."""
        return model

    def save(self, compressed: Any, folder: Path) -> None:
        """The same bytes, by hard links where the file system has them."""
        for source in files(compressed):
            try:
                os.link(source.resolve(), folder / source.name)
            except OSError:
                shutil.copyfile(source, folder / source.name)

    def load(self, folder: Path) -> Runner:
        """Through our layers."""
        return TorchRunner(read(folder))


def files(place: Path) -> list[Path]:
    """The file itself, or the files of weights, settings and tokenizer in a folder, sorted."""
    if place.is_file():
        return [place]
    return sorted(file for file in place.iterdir() if file.suffix in WANTED and file.is_file())


def checksum(place: Path) -> str:
    """sha256, 64 hex digits, of a file, or over the names and sha256 of a folder's files."""
    sums = {}
    for file in files(place):
        with file.open("rb") as stream:
            sums[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    if place.is_file():
        return sums[place.name]
    lines = "".join(f"{digest}  {name}\n" for name, digest in sums.items())  # as sha256sum prints
    return hashlib.sha256(lines.encode()).hexdigest()


register("file", File())
