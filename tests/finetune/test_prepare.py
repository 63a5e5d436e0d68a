"""prepare: what ends up in the token files, whatever the workers; resuming; refusals."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from bench import models
from bench.errors import UsageError
from finetune import tasks
from finetune.options import build
from finetune.prepare import Settings, run
from finetune.text import parts
from finetune.text.documents import digest, documents
from finetune.text.join_parts import held_out
from finetune.text.token_file import TokenFile, tokenizer_sha256

USER_DATA = os.environ.get("SLIMBENCH_DATA")  # before the fixtures of the session hide it
ROOT = Path(__file__).parents[2]


def story(number: int) -> str:
    return f"Story {number}. " + f"The {number * 37 % 101}th fox meets dog {number}. " * (
        number % 9 + 4
    )


@pytest.fixture
def texts(tmp_path) -> Path:
    """A folder with 3 kinds of file: 302 documents, of which one comes twice and one is short."""
    folder = tmp_path / "raw"
    (folder / "deep").mkdir(parents=True)
    rows = [story(n) for n in range(200)] + ["too short", story(7)]
    (folder / "b.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    (folder / "a.txt").write_text("<|endoftext|>\n".join(story(n) for n in range(200, 260)))
    pages = "".join(
        f"<page><title>P{n}</title><ns>0</ns><revision><text>''{story(n)}'' {{{{x}}}}</text>"
        "</revision></page>"
        for n in range(260, 300)
    )
    (folder / "deep/c.xml").write_text(f"<mediawiki>{pages}</mediawiki>")
    (folder / "notes.md").write_text("not for training")
    return folder


def prepare(texts: Path, out: Path, **changes) -> dict:
    values = {"inputs": (str(texts),), "tokenizer": "tiny-gpt2", "validation": 0.1, "workers": 1}
    return run(Settings(**values | {"out": out} | changes))


def bytes_of(out: Path) -> dict[str, bytes]:
    files = [*out.glob("*.tokens"), *out.glob("parts/*"), *out.glob("tokenizer/*")]
    return {
        str(file.relative_to(out)): file.read_bytes() for file in [*files, out / "prepare.json"]
    }


def decoded(out: Path, name: str) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer", local_files_only=True)
    text = tokenizer.decode(TokenFile(out / f"{name}.tokens").tokens)
    assert text.endswith(tokenizer.eos_token)
    return text.split(tokenizer.eos_token)[:-1]


def test_every_document_once_in_train_or_validation(texts, tmp_path):
    out = tmp_path / "out"
    summary = prepare(texts, out)
    train, validation = decoded(out, "train"), decoded(out, "validation")
    expected = [story(n).strip() for n in range(200, 260)] + [story(n).strip() for n in range(200)]
    expected += [f"P{n}\n\n{story(n).strip()}" for n in range(260, 300)]
    held = held_out(np.array([digest(text) for text in expected], np.uint64), 0.1, 0)
    assert train == [text for text, is_held in zip(expected, held, strict=True) if not is_held]
    assert validation == [text for text, is_held in zip(expected, held, strict=True) if is_held]
    assert 10 < len(validation) < 60  # 30 of 300, give or take four deviations

    assert json.loads((out / "prepare.json").read_text()) == summary
    names = [source["name"] for source in summary["sources"]]
    assert names == ["a.txt", "b.jsonl", "deep/c.xml"]
    assert [source["documents"] for source in summary["sources"]] == [60, 201, 40]
    assert [source["dropped"] for source in summary["sources"]] == [{}, {"short": 1}, {}]
    assert summary["duplicates"] == 1 and summary["tokens_cut_from_the_longest"] == 0
    # tiny-gpt2 has one token a byte, and one more for the end of each document.
    assert summary["sources"][0]["tokens"] == summary["sources"][0]["characters"] + 60
    file = TokenFile(out / "train.tokens")
    file.verify()
    assert summary["train"]["sha256"] == file.sha256()
    assert file.header["vocabulary"] == 257 and file.header["end"] == 256
    tokenizer = models.tokenizer(models.resolve("tiny-gpt2"))
    assert file.header["tokenizer_sha256"] == tokenizer_sha256(tokenizer)
    assert [source["name"] for source in file.header["sources"]] == names


def test_ids_are_those_of_transformers(texts, tmp_path):
    prepare(texts, tmp_path / "out", train_tokenizer=300, tokenizer=None, validation=0.0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out/tokenizer", local_files_only=True)
    found = [text for name in ("a.txt", "b.jsonl") for text in documents(texts / name)]
    ids = [token for text in found for token in [*tokenizer(text)["input_ids"], 0]]
    assert TokenFile(tmp_path / "out/train.tokens").tokens[: len(ids)].tolist() == ids
    assert not (tmp_path / "out/validation.tokens").exists()


def test_same_bytes_for_any_number_of_workers(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "BATCH", 2000)  # characters: some twenty batches
    for count in (1, 3):
        prepare(texts, tmp_path / str(count), workers=count, tokenizer=None, train_tokenizer=300)
    assert bytes_of(tmp_path / "1") == bytes_of(tmp_path / "3")


def test_a_second_run_reuses_what_is_finished(texts, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    prepare(texts, out, tokenizer=None, train_tokenizer=300)
    before = bytes_of(out)
    read: list[str] = []
    real = parts.raw_documents
    monkeypatch.setattr(
        parts, "raw_documents", lambda path, *rest: (read.append(path.name), real(path, *rest))[1]
    )
    prepare(texts, out, tokenizer=None, train_tokenizer=300)
    assert read == [] and "is prepared already" in capsys.readouterr().out
    (out / "train.tokens").unlink()
    next((out / "parts").glob("b.jsonl-*.index")).unlink()
    prepare(texts, out, tokenizer=None, train_tokenizer=300)
    assert read == ["b.jsonl"] and bytes_of(out) == before
    prepare(texts, out, tokenizer=None, train_tokenizer=300, validation=0.2)
    held = TokenFile(out / "validation.tokens").header["documents"]
    assert held > 40  # another share: the tokenizer learns from other documents, so all is new
    read.clear()
    (texts / "a.txt").write_text((texts / "a.txt").read_text() + story(999))
    prepare(texts, out)
    prepare(texts, out, minimum=50)
    assert read == ["a.txt", "b.jsonl", "c.xml"] * 2


def test_what_was_finished_survives_a_failure(texts, tmp_path, monkeypatch):
    out = tmp_path / "out"
    (texts / "deep/c.xml").write_text("<mediawiki><page>")
    with pytest.raises(ValueError, match=r"c\.xml line 1: not well-formed XML"):
        prepare(texts, out)
    assert not (out / "prepare.json").exists()
    # The reader is at most one batch ahead, so a.txt was done; half of b.jsonl is swept away.
    assert [part.name[:5] for part in (out / "parts").glob("*.tokens")] == ["a.txt"]
    (texts / "deep/c.xml").unlink()
    (out / "parts/.left.tokens.part").write_text("by a killed run")
    prepare(texts, out)
    assert len(list((out / "parts").iterdir())) == 4
    assert [file.name for file in out.iterdir() if file.name.startswith(".")] == [".lock"]


def test_held_out_documents_are_stable(tmp_path):
    digests = np.random.default_rng(0).integers(0, 2**64, 100_000, np.uint64)
    held = held_out(digests, 0.1, 0)
    assert abs(held.mean() - 0.1) < 0.004  # four deviations of a binomial
    assert np.array_equal(held_out(digests[::-1], 0.1, 0), held[::-1])
    assert (held <= held_out(digests, 0.2, 0)).all(), "a larger share holds the same ones and more"
    other = held_out(digests, 0.1, 1)
    assert abs((held & other).mean() - 0.01) < 0.0013, "another seed chooses independently"
    # SplitMix64 with the state 0 gives this first number, as its authors' code does.
    assert held_out(np.zeros(1, np.uint64), 0xE220A8397B1DCDAF / 2**64 + 1e-9, 0)[0]
    assert not held_out(np.zeros(1, np.uint64), 0xE220A8397B1DCDAF / 2**64 - 1e-9, 0)[0]


@pytest.mark.parametrize("count", [1, 3])
def test_of_few_documents_the_end_of_the_longest_is_held_out(tmp_path, count):
    for n in range(count):
        (tmp_path / f"{n}.txt").write_text("".join(f"{n} {i} " for i in range(500 * (n + 1))))
    files = tuple(str(tmp_path / f"{n}.txt") for n in range(count))
    settings = Settings(inputs=files, out=tmp_path / "out", tokenizer="tiny-gpt2", workers=1)
    summary = run(settings)
    whole = "".join(path.read_text().strip() + "<|endoftext|>" for path in map(Path, files))
    train, [end] = decoded(tmp_path / "out", "train"), decoded(tmp_path / "out", "validation")
    assert whole.endswith(end + "<|endoftext|>")
    assert "".join(text + "<|endoftext|>" for text in [*train[:-1], train[-1] + end]) == whole
    tokens = len(whole) - 12 * count  # the end of a document is one token of 13 characters
    assert summary["tokens_cut_from_the_longest"] == int(0.01 * tokens) == len(end) + 1


def test_text_that_looks_like_a_special_token_stays_text(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps("fair <|endoftext|> words " * 9))
    run(Settings(inputs=(str(tmp_path / "a.jsonl"),), out=tmp_path / "out", tokenizer="tiny-gpt2",
                 validation=0.0, workers=1))  # fmt: skip
    tokens = TokenFile(tmp_path / "out/train.tokens").tokens
    assert (tokens == 256).sum() == 1 and tokens[-1] == 256


def test_a_tokenizer_without_a_model_will_do(texts, tmp_path):
    prepare(texts, tmp_path / "one", tokenizer=None, train_tokenizer=300, special_tokens=("<x>",))
    folder = tmp_path / "one/tokenizer"
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id("<x>") == 1
    prepare(texts, tmp_path / "two", tokenizer=str(folder))
    for name in ("train.tokens", "validation.tokens", "tokenizer/tokenizer.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"inputs": ()}, "give either files and folders to prepare, or --task"),
        ({"task": "mrpc"}, "give either files and folders to prepare, or --task"),
        ({"train_tokenizer": 300}, "give either --tokenizer"),
        ({"tokenizer": None}, "give either --tokenizer"),
        ({"tokenizer": None, "train_tokenizer": 99}, "train_tokenizer must be at least 257"),
        ({"validation": 0.5}, "--validation is a share below 0.5, not 0.5"),
        ({"validation": -0.1}, "below 0.5, not -0.1"),
        ({"split_on": "["}, r"split_on '\[' is no pattern"),
        ({"inputs": ("nowhere.txt",)}, "nowhere.txt: no such file or folder"),
        ({"inputs": ("notes.md",)}, "notes.md: not a kind that can be read"),
        ({"inputs": ("empty",)}, "empty holds no .txt"),
        ({"inputs": ("raw",), "out": "raw/out"}, "--out raw/out lies within the input raw"),
    ],
)
def test_usage_errors(texts, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.md").write_text("text")
    (tmp_path / "empty").mkdir()
    values = {"inputs": ("raw",), "tokenizer": "tiny-gpt2", "out": "out", "workers": 1}
    with pytest.raises(UsageError, match=message):
        run(build(Settings, values | changes))
    assert not list(tmp_path.rglob("*.tokens"))


def test_nothing_left_is_an_error(texts, tmp_path):
    with pytest.raises(ValueError, match="no documents are left; lower --minimum"):
        prepare(texts, tmp_path / "out", minimum=10_000)


def test_two_processes_do_not_prepare_the_same_folder(texts, tmp_path):
    code = (
        "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX);"
        "print('held', flush=True); sys.stdin.read()"
    )
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", code, str(tmp_path / "out/.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with pytest.raises(UsageError, match="another process is preparing"):
            prepare(texts, tmp_path / "out")
        other.communicate()
    prepare(texts, tmp_path / "out")


def exit_at_once(batch: list) -> None:
    os._exit(9)


def test_a_worker_that_dies_is_said_so():
    from finetune.text.worker_pool import workers

    death = pytest.raises(ValueError, match=r"a worker process died, .* use fewer --workers")
    with death, workers(2) as in_order:
        list(in_order(exit_at_once, [(0, [])]))


class Stub:
    """A task without a validation set."""

    name = "stub"

    def examples(self, split: str) -> list:
        if split == "validation":
            raise ValueError("validation is not here: put it there")
        return [tasks.Example("Q: caf\u00e9?", " yes", (" yes", " no"), ("yes",), f"{split}-1")]


def test_a_task_becomes_json_lines_that_the_bench_reads(tmp_path, monkeypatch, capsys):
    from bench import text_files

    monkeypatch.setitem(tasks.TASKS, "stub", Stub())
    assert run(Settings(task="stub", out=tmp_path)) == {
        "task": "stub", "examples": {"train": 1, "test": 1},
    }  # fmt: skip
    assert sorted(file.name for file in tmp_path.iterdir()) == ["test.jsonl", "train.jsonl"]
    assert json.loads((tmp_path / "test.jsonl").read_text()) == {
        "prompt": "Q: caf\u00e9?", "target": " yes", "candidates": [" yes", " no"],
        "references": ["yes"], "group": "test-1", "text": "Q: caf\u00e9? yes",
    }  # fmt: skip
    assert text_files.read(tmp_path / "train.jsonl") == ["Q: caf\u00e9? yes"]
    assert "no validation: validation is not here" in capsys.readouterr().out
    with pytest.raises(UsageError, match="no task 'stab'; did you mean stub"):
        run(Settings(task="stab", out=tmp_path))


@pytest.mark.skipif(not USER_DATA, reason="SLIMBENCH_DATA is not set")
def test_real_dump(tmp_path):
    dump = next((Path(str(USER_DATA)) / "wikipedia-xml").glob("enwiki-table-markup*"))
    summary = run(Settings(inputs=(str(dump),), out=tmp_path, train_tokenizer=1000, workers=2))
    assert summary["sources"][0]["documents"] == 5
    [tokens, characters] = (summary["sources"][0][name] for name in ("tokens", "characters"))
    assert 2.5 < characters / tokens < 6
