"""Names of models: the order of the sources, what a revision is, refusals, the hub."""

import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench import models
from compress import checkpoint

SHA = "0123456789abcdef0123456789abcdef01234567"
RESOLVE = """
import json, sys
from bench import models
for name in sys.argv[1:]:
    try:
        print(json.dumps(["ok", str(models.resolve(name).folder)]))
    except ValueError as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


@pytest.fixture
def copy(tiny_llama, tmp_path) -> Path:
    """A model folder that the test may spoil."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "my-llama"))


@pytest.fixture
def shelf(tiny_gpt2, tmp_path, monkeypatch) -> Path:
    """$SLIMBENCH_MODELS with one model called gpt2."""
    shutil.copytree(tiny_gpt2, tmp_path / "shelf" / "gpt2")
    monkeypatch.setenv("SLIMBENCH_MODELS", str(tmp_path / "shelf"))
    return tmp_path / "shelf"


def refusal(name: str | Path, kind: type = ValueError) -> str:
    with pytest.raises(kind) as caught:
        models.resolve(str(name))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def test_gpt2_mini_comes_with_the_package():
    found = models.resolve("gpt2-mini")
    model = checkpoint.load(found.folder)
    blocks = 5 * (12 * 256**2 + 13 * 256)
    expected = (4096 + 512) * 256 + blocks + 2 * 256  # tokens, positions, blocks, last norm
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    assert sum(file.stat().st_size for file in found.folder.glob("*.safetensors")) <= 12e6
    assert models.lineage(found)["source"] == "pretrain, 972 steps"


def test_aliases_of_the_issue_are_there():
    wanted = "gpt2 gpt2-medium gpt2-large gpt2-xl distilgpt2 llama-2-7b llama-2-13b tinyllama-1.1b"
    own = {"smollm2-135m", "gpt2-mini", "tiny-gpt2", "tiny-llama"}
    assert set(models.ALIASES) == {*wanted.split(), *own}
    assert models.ALIASES["llama-2-7b"] == "meta-llama/Llama-2-7b-hf"
    assert all(models.NAME.fullmatch(hub_id) for hub_id in models.ALIASES.values() if hub_id)


def test_local_folder_is_named_after_itself(copy, monkeypatch):
    model = models.resolve(str(copy))
    assert (model.alias, model.folder) == ("my-llama", copy)
    monkeypatch.chdir(copy)
    assert models.resolve(".") == model


def test_models_folder_is_found_by_alias_and_by_the_end_of_the_hub_id(shelf):
    assert models.resolve("gpt2").folder == shelf / "gpt2"
    assert models.resolve("openai-community/gpt2").folder == shelf / "gpt2"
    assert models.resolve("openai-community/gpt2").alias == "gpt2"
    for place in ("TinyLlama-1.1B-Chat-v1.0", "tinyllama-1.1b"):
        (shelf / "gpt2").rename(shelf / place)
        model = models.resolve("tinyllama-1.1b")
        assert (model.alias, model.folder) == ("tinyllama-1.1b", shelf / place)
        (shelf / place).rename(shelf / "gpt2")


def test_order_is_path_then_models_folder_then_cache(shelf, copy, monkeypatch):
    cached = models.resolve("tiny-llama").folder
    shutil.copytree(shelf / "gpt2", shelf / "tiny-llama")
    assert models.resolve("tiny-llama").folder == shelf / "tiny-llama"
    monkeypatch.chdir(copy.parent)
    copy.rename("tiny-llama")
    assert models.resolve("tiny-llama").folder == copy.parent / "tiny-llama"
    shutil.rmtree("tiny-llama")
    shutil.rmtree(shelf / "tiny-llama")
    assert models.resolve("tiny-llama").folder == cached


@pytest.mark.parametrize("name", ["../gpt2", "inner/../../gpt2", "./../gpt2", "inner/.."])
def test_names_do_not_leave_the_models_folder(name, shelf, tmp_path, monkeypatch):
    (shelf / "inner" / "inner").mkdir(parents=True)
    monkeypatch.setenv("SLIMBENCH_MODELS", str(shelf / "inner"))
    monkeypatch.chdir(tmp_path)
    assert (shelf / "inner" / name).exists()
    assert "there is no such folder" in refusal(name, models.UnknownModel)


def test_models_folder_that_is_none_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("SLIMBENCH_MODELS", str(tmp_path / "gone"))
    assert f"SLIMBENCH_MODELS={tmp_path}/gone is not a folder" in refusal("gpt2")


def test_revision_follows_every_byte_that_decides_the_numbers(copy):
    before = models.resolve(str(copy)).revision
    assert len(before) == 16
    (copy / "lineage.json").write_text("{}")
    assert models.resolve(str(copy)).revision == before
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    changed = models.resolve(str(copy)).revision
    change_config(copy, rms_norm_eps=1e-3)
    again = models.resolve(str(copy)).revision
    with (copy / "tokenizer.json").open("a") as file:
        file.write(" ")
    assert len({before, changed, again, models.resolve(str(copy)).revision}) == 4


def test_big_files_are_hashed_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMBENCH_CACHE", str(tmp_path / "cache"))
    big = tmp_path / "big"
    with big.open("wb") as file:
        file.truncate(models.REMEMBER_HASH_BYTES)
    # The digest of 16 MiB of zeros, as sha256sum prints it.
    zeros = "080acf35a507ac9849cfcba47dc2ad83e01b75663a516279c8b9d243b719643e"
    assert models._sha256(big) == zeros
    (note,) = (tmp_path / "cache" / "hashes").iterdir()
    note.write_text("f" * 64)
    assert models._sha256(big) == "f" * 64  # not read again
    note.write_text("cut sho")
    assert models._sha256(big) == zeros
    note.write_text("f" * 64)
    os.utime(big, ns=(1, 1))
    assert models._sha256(big) == zeros  # changed since


def test_load_gives_linear_layers_and_the_same_logits(tiny_gpt2):
    from transformers import AutoModelForCausalLM

    ids = torch.arange(0, 250, 3)[None]
    model = checkpoint.load(models.resolve(str(tiny_gpt2)).folder)
    assert isinstance(model.transformer.h[0].attn.c_attn, torch.nn.Linear)
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(tiny_gpt2)(ids).logits
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)


def test_folder_without_config_is_refused(copy):
    (copy / "config.json").unlink()
    assert f"{copy} is not a model folder: config.json is missing" in refusal(copy)
    (copy / "adapter_config.json").write_text("{}")
    assert "merge it into its base model" in refusal(copy)


def test_pickled_weights_are_refused(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    assert "safetensors" in refusal(copy) and str(copy) in refusal(copy)


def test_other_kinds_of_model_are_refused(copy):
    change_config(copy, model_type="bert")
    assert refusal(copy) == f"{copy}/config.json: model_type 'bert'; give one of: llama, gpt2"
    (copy / "config.json").write_text("[")
    assert "config.json is not valid JSON" in refusal(copy)


@pytest.mark.parametrize("keep", [0, 4, 100, 5000])
def test_truncated_weights_are_refused(copy, keep):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    assert refusal(copy).startswith(f"{weights} is corrupt or cut short")


def test_missing_shard_is_refused(copy):
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"{copy}/model-00002-of-00002.safetensors is missing" in refusal(copy)


def test_folder_without_tokenizer_is_refused(copy):
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        models.tokenizer(models.resolve(str(copy)))


def test_broken_tokenizer_is_refused(copy):
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="bad tokenizer"):
        models.tokenizer(models.resolve(str(copy)))


def test_unknown_names_get_a_suggestion(tmp_path, shelf):
    assert "did you mean gpt2" in refusal("gtp2", models.UnknownModel)
    assert "there is no such folder" in refusal("a/b/c", models.UnknownModel)
    assert "there is no such folder" in refusal("~nobody/x", models.UnknownModel)
    for name in ("", " ", "x\0y", "x" * 5000, tmp_path / "gone.gguf"):
        refusal(name, models.UnknownModel)


class FakeHub(BaseHTTPRequestHandler):
    """Enough of the hub's HTTP interface for one model, org/tiny, and one of pickles."""

    files: dict[str, bytes]
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(path)
        name = path.rpartition("/")[2]
        tree = [
            {"type": "file", "path": key, "size": len(value), "oid": "0" * 40}
            for key, value in self.files.items()
        ]
        if path == "/api/models/org/pickles":
            self.answer({"id": "org/pickles", "siblings": [{"rfilename": "pytorch_model.bin"}]})
        elif path in ("/api/models/org/tiny", "/api/models/org/tiny/revision/main"):
            siblings = [{"rfilename": key} for key in self.files]
            self.answer({"id": "org/tiny", "sha": SHA, "siblings": siblings})
        elif path.startswith("/api/models/org/tiny/tree/"):
            self.answer(tree)
        elif path.startswith("/org/tiny/resolve/") and name in self.files:
            self.answer(self.files[name])
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def answer(self, content: object) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hash(body):x}"')
        self.send_header("X-Repo-Commit", SHA)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Silent."""


def resolve_elsewhere(hub: str, home: Path, *names: str) -> list[list[str]]:
    """[outcome, folder or message] of each name, in a process that asks `hub`."""
    places = {"HF_ENDPOINT": hub, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE, *names],
        cwd=Path(__file__).parents[2],
        env=os.environ | places | {"HF_HUB_DISABLE_XET": "1", "SLIMBENCH_MODELS": ""},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_hub_gives_safetensors_only_and_its_cache_serves_when_it_is_gone(
    tiny_llama, tmp_path, monkeypatch
):
    FakeHub.files = {path.name: path.read_bytes() for path in tiny_llama.iterdir()}
    FakeHub.files |= {"pytorch_model.bin": b"pickle", "modeling.py": b"code"}
    FakeHub.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub = f"http://127.0.0.1:{server.server_port}"
    names = ("org/tiny", "org/gone", "org/pickles")
    tiny, gone, pickles = resolve_elsewhere(hub, tmp_path, *names)
    server.shutdown()
    server.server_close()

    assert tiny[0] == "ok"
    fetched = {path.name for path in Path(tiny[1]).iterdir()}
    assert fetched == {path.name for path in tiny_llama.iterdir()} - {"lineage.json"}
    assert not any(path.endswith((".bin", ".py")) for path in FakeHub.asked)
    assert models.resolve(tiny[1]).revision == models.resolve(str(tiny_llama)).revision
    assert gone[0] == "UnknownModel" and "'org/gone'" in gone[1]
    assert pickles[0] == "ValueError" and "no safetensors" in pickles[1]

    # Nothing listens there any more: what is cached is served, the rest fails at once.
    again, gpt2 = resolve_elsewhere(hub, tmp_path, "org/tiny", "gpt2")
    assert again == tiny
    assert "put its folder in $SLIMBENCH_MODELS/gpt2" in gpt2[1]
    assert "\n" not in gpt2[1]

    # A download that was cut short is not taken for the model.
    (Path(tiny[1]) / "model.safetensors").unlink()
    for listing in (tmp_path / "hub" / "models--org--tiny").glob("tree*"):
        shutil.rmtree(listing)  # older versions of the hub's library keep none
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert "cannot come from the hub" in refusal("org/tiny")
