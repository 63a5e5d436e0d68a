"""Texts for the tests of finetune: invented, and repetitive enough to be learned in seconds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SENTENCES = (
    "The {0} cat sat near the {1} door and waited for the {2} morning.",
    "A {1} dog ran over the {0} hill while the {2} wind was blowing.",
    "Nobody had seen the {2} boat since the {0} storm and the {1} night.",
)
WORDS = ("old", "green", "quiet", "small", "cold", "bright", "narrow", "wet", "last", "second")


@pytest.fixture(scope="session")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .txt file of some 60 kB: a hundred paragraphs that differ in a few words."""
    lines = []
    for number in range(100):
        words = [WORDS[(number * step + step) % len(WORDS)] for step in (1, 3, 7)]
        lines.append(" ".join(sentence.format(*words) for sentence in 3 * SENTENCES))
    file = tmp_path_factory.mktemp("story") / "story.txt"
    file.write_text("\n\n".join(lines))
    return file


@pytest.fixture
def finetune(own_cache: Path):
    """Run `python -m finetune ...` in a process of its own, or several under torchrun."""

    def call(*arguments: str, processes: int = 0, check: bool = True):
        command = [sys.executable]
        if processes:
            command += ["-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc_per_node", str(processes)]
        command += ["-m", "finetune", *map(str, arguments)]
        threads = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command, env=os.environ | threads, capture_output=True, text=True, cwd=own_cache
        )
        assert not check or done.returncode == 0, done.stderr[-3000:]
        return done

    return call
