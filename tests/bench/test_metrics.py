"""metrics: runners and files whose perplexity, times and sizes are known beforehand."""

import gc
import itertools
import json
import math
import os
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import save_file
from torch.nn import functional as F

import compress
from bench.data import Blocks
from bench.metrics.latency import MOST, REPEATS, latency
from bench.metrics.perplexity import BATCH_TOKENS, CHUNK_TOKENS, perplexity, token_nll
from bench.metrics.size import payload, size
from bench.metrics.subject import Subject
from compress import compiled, token_step
from compress.base import TorchRunner

VOCABULARY = 128


def subject(runner=None, ids=None, artefact=None, prompt_tokens=6, new_tokens=3):
    if ids is None:
        ids = torch.zeros(1, 2, dtype=torch.int64)
    return Subject(
        runner=runner,
        artefact=artefact,
        blocks=Blocks(ids, "made up", "test", "0" * 64, ids.numel()),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
    )


def quiet(done, total):
    pass


def random_ids(*shape, top=VOCABULARY):
    return torch.randint(0, top, shape, generator=torch.Generator().manual_seed(1))


class Scorer:
    """A runner that knows which token follows, and answers `score(following)`, (n, vocabulary)."""

    def __init__(self, score):
        self.score = score
        self.batch_tokens, self.chunk_tokens = [], []

    def logit_chunks(self, ids, chunk_tokens):
        self.batch_tokens.append(ids.numel())
        self.chunk_tokens.append(chunk_tokens)
        following = ids.roll(-1, dims=1).flatten()  # wrong, on purpose, at the end of a block
        for start in range(0, len(following), chunk_tokens):
            piece = slice(start, min(start + chunk_tokens, len(following)))
            yield piece, self.score(following[piece])


def uniform(following):
    return torch.zeros(len(following), VOCABULARY)


def oracle(following):
    return 100.0 * F.one_hot(following, VOCABULARY)


def test_a_runner_that_knows_nothing_scores_the_size_of_its_vocabulary():
    values = perplexity(subject(Scorer(uniform), random_ids(3, 50)), quiet)
    assert values["perplexity"] == pytest.approx(128, rel=1e-6)
    assert values["nll_nats"] == pytest.approx(3 * 49 * math.log(128), rel=1e-6)
    assert (values["scored_tokens"], values["block_tokens"]) == (3 * 49, 50)


def test_an_oracle_scores_1():
    values = perplexity(subject(Scorer(oracle), random_ids(3, 50)), quiet)
    assert values["perplexity"] == 1.0 and values["block_nll_nats"] == [0.0, 0.0, 0.0]


def test_sums_of_blocks_by_hand_in_several_batches():
    """Block k is all token k, and 2 ** k tokens are as likely: k bits a token."""

    def score(following):
        likely = torch.arange(VOCABULARY) < 2 ** following[:, None]
        return torch.where(likely, 0.0, -math.inf)  # the next block's first token: impossible

    ids = torch.arange(8)[:, None].expand(8, 1024)
    runner, steps = Scorer(score), []
    values = perplexity(subject(runner, ids), lambda *step: steps.append(step))
    bits = [k * 1023 * math.log(2) for k in range(8)]
    assert values["block_nll_nats"] == pytest.approx(bits, rel=1e-6)
    assert values["nll_nats"] == math.fsum(values["block_nll_nats"])
    assert values["perplexity"] == math.exp(values["nll_nats"] / (8 * 1023))
    assert values["perplexity"] == pytest.approx(2**3.5, rel=1e-6)
    assert sum(runner.batch_tokens) == 8 * 1024 and len(runner.batch_tokens) > 1
    assert max(runner.batch_tokens) <= BATCH_TOKENS
    assert max(runner.chunk_tokens) <= CHUNK_TOKENS
    assert steps == sorted(steps) and steps[-1] == (8, 8)
    json.dumps(values, allow_nan=False)


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
@pytest.mark.parametrize(
    "method, dtype, within", [("none", torch.float32, 1e-5), ("cast", torch.bfloat16, 1e-3)]
)
def test_agrees_with_cross_entropy_of_the_full_logits(method, dtype, within, family, request):
    model = compress.apply(method, compress.load(request.getfixturevalue(family)))
    runner, ids, seen = TorchRunner(model), random_ids(5, 200, top=256), []
    full = runner.logits(ids)[:, :-1].double()
    expected = F.cross_entropy(full.transpose(1, 2), ids[:, 1:], reduction="none").sum(1)
    decoder = runner.decoder
    assert decoder is not None

    def head(hidden):
        seen.append(decoder.head(hidden))
        return seen[-1]

    runner.decoder = replace(decoder, head=head)
    values = perplexity(subject(runner, ids), quiet)
    assert values["block_nll_nats"] == pytest.approx(expected.tolist(), rel=within)
    mean = expected.sum().item() / (5 * 199)
    assert values["perplexity"] == pytest.approx(math.exp(mean), rel=10 * within)
    assert {output.dtype for output in seen} == {dtype}
    rows = [output.numel() // output.shape[-1] for output in seen]
    assert sum(rows) == 5 * 200 and max(rows) <= CHUNK_TOKENS  # the full logits never exist


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_runner_that_gives_nan_or_infinity_is_refused(wrong):
    def score(following):
        logits = uniform(following)
        logits[0, 5] = wrong
        return logits

    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        perplexity(subject(Scorer(score), random_ids(2, 10)), quiet)


def test_a_runner_that_skips_positions_is_refused():
    class Skipper(Scorer):
        def logit_chunks(self, ids, chunk_tokens):
            yield from list(super().logit_chunks(ids, chunk_tokens))[:-1]

    with pytest.raises(FloatingPointError):
        perplexity(subject(Skipper(uniform), random_ids(2, 100)), quiet)


def test_an_impossible_token_is_refused():
    def score(following):
        logits = uniform(following)
        logits[0, following[0]] = -math.inf
        return logits

    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        perplexity(subject(Scorer(score), random_ids(2, 10)), quiet)


@pytest.mark.parametrize("shape", [(0, 8), (3, 1)])
def test_blocks_with_nothing_to_score_are_refused(shape):
    with pytest.raises(ValueError, match="nothing to score in blocks of shape"):
        perplexity(subject(None, torch.zeros(shape, dtype=torch.int64)), quiet)


@pytest.mark.parametrize("offset", [0.0, -1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_token_nll_agrees_with_log_softmax(dtype, offset):
    generator = torch.Generator().manual_seed(2)
    logits = (10 * torch.randn(50, 300, generator=generator) + offset).to(dtype)
    targets, before = random_ids(50, top=300), logits.clone()
    nll = token_nll(logits, targets)
    expected = -logits.double().log_softmax(-1)[torch.arange(50), targets]
    assert nll.dtype == torch.float32 and torch.equal(logits, before)
    # The steps are sums of numbers as large as the logits: a few of their float32 ulps.
    atol = 2e-7 * (50 + abs(offset))
    torch.testing.assert_close(nll.double(), expected, rtol=1e-6, atol=atol)


def test_token_nll_by_hand():
    logits = torch.tensor([[0.0, -math.inf, 0.0], [math.log(3), 0.0, -math.inf]])
    expected = torch.tensor([math.log(2), math.log(4)])
    torch.testing.assert_close(token_nll(logits, torch.tensor([0, 1])), expected)


class Sleeper:
    """A runner on a clock of its own. Prompt n takes prompt_s[n], the others the last of them."""

    def __init__(self, prompt_s, token_s):
        self.prompt_s, self.token_s, self.now = prompt_s, token_s, 0.0
        self.prompts, self.fed = [], []

    def clock(self):
        return self.now

    def prefill(self, ids):
        assert not gc.isenabled()
        self.now += self.prompt_s[min(len(self.prompts), len(self.prompt_s) - 1)]
        self.prompts.append(ids.tolist())
        self.cache = object()
        return F.one_hot(torch.tensor([7]), 10).float(), self.cache

    def decode(self, ids, cache):
        assert cache is self.cache and ids.shape == (1, 1)
        self.now += self.token_s
        self.fed.append(ids.item())
        return F.one_hot(torch.tensor([len(self.fed) % 5]), 10).float()

    def kernels(self, rows):
        return [f"made for {rows}"]


def timed(runner, **lengths):
    return latency(subject(runner, torch.arange(12).view(3, 4), **lengths), quiet, runner.clock)


def test_known_times_are_what_it_reports():
    runner = Sleeper([60.0, 0.25], token_s=0.125)  # the warm-up is slow and does not count
    values = timed(runner)
    assert values["prefill_samples_ms"] == [250.0] * REPEATS
    assert values["decode_samples_ms"] == [125.0] * REPEATS
    assert (values["prefill_ms"], values["decode_ms"]) == (250.0, 125.0)
    assert values["decode_tokens_per_s"] == 8.0
    assert values["prefill_p95_ms"] == 250.0 and values["prefill_iqr_ms"] == 0.0
    assert (values["prompt_tokens"], values["new_tokens"]) == (6, 3)
    assert values["prefill_kernels"] == ["made for 6"]
    assert values["decode_kernels"] == ["made for 1"]
    assert values["threads"] == torch.get_num_threads()
    json.dumps(values, allow_nan=False)


def test_the_summary_by_hand():
    values = timed(Sleeper([9.0, 5.0, 1.0, 4.0, 2.0, 3.0], token_s=1.0))
    assert values["prefill_samples_ms"] == [5000.0, 1000.0, 4000.0, 2000.0, 3000.0]
    assert values["prefill_ms"] == 3000.0 and values["prefill_iqr_ms"] == 2000.0
    assert values["prefill_p95_ms"] == pytest.approx(4800.0)


def test_reads_one_prompt_and_feeds_back_its_own_tokens():
    runner = Sleeper([1.0], token_s=1.0)
    timed(runner)
    assert runner.prompts == [[[0, 1, 2, 3, 4, 5]]] * (REPEATS + 1)
    assert len(runner.fed) == 3 * (REPEATS + 1)
    assert runner.fed == [7 if n % 3 == 0 else n % 5 for n in range(len(runner.fed))]


@pytest.mark.parametrize(
    "step_s, repeats",
    # A repeat is a prompt and 3 tokens, 4 steps: 1/16 s until 2 s are full, or at most MOST.
    [(1.0, REPEATS), (2.0**-6, 32), (2.0**-20, MOST)],
)
def test_repeats_are_enough_in_number_and_in_time(step_s, repeats):
    values = timed(Sleeper([60.0, step_s], step_s))
    assert len(values["prefill_samples_ms"]) == len(values["decode_samples_ms"]) == repeats


def test_progress_ends_at_the_number_of_repeats():
    runner, steps = Sleeper([2.0**-6], 2.0**-6), []
    latency(subject(runner, random_ids(2, 8)), lambda *step: steps.append(step), runner.clock)
    assert steps == sorted(steps) and steps[-1] == (REPEATS, REPEATS)


@pytest.mark.parametrize("before", [True, False])
def test_garbage_collection_is_left_as_it_was(before):
    runner, broken = Sleeper([1.0], 1.0), Sleeper([1.0], 1.0)
    broken.decode = lambda ids, cache: 1 / 0
    try:
        if not before:
            gc.disable()
        timed(runner)
        assert gc.isenabled() == before
        with pytest.raises(ZeroDivisionError):
            timed(broken)
        assert gc.isenabled() == before
    finally:
        gc.enable()


def test_a_prompt_longer_than_the_text_is_refused():
    runner = Sleeper([1.0], 1.0)
    timed(runner, prompt_tokens=12)
    with pytest.raises(ValueError, match="hold 12 tokens, fewer than a prompt of 13"):
        timed(runner, prompt_tokens=13)


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
def test_latency_of_a_real_runner(family, request):
    runner = TorchRunner(compress.load(request.getfixturevalue(family)))
    clock = itertools.count().__next__  # a second passes between two looks at it
    values = latency(subject(runner, random_ids(2, 8, top=256)), quiet, clock)
    assert (values["prefill_ms"], values["decode_tokens_per_s"]) == (1000.0, pytest.approx(3.0))
    step = [token_step.NAME] if compiled.library() else []  # where there is a compiler
    layers = {layer.kernel(1, torch.float32) for layer in runner.decoder.linears()}
    assert layers <= {"linear float32", "compiled float32"}  # whichever is faster
    assert values["prefill_kernels"] == sorted(layers)  # 6 tokens are few too
    assert values["decode_kernels"] == sorted([*step, *layers])
    assert runner.kernels(16) == ["linear float32"]


# tiny-llama: width 64, inner 160, 3 blocks, 2 of 4 heads for k and v, vocabulary 257, not tied.
LLAMA_ROWS = {64: 3 * (64 + 32 + 32 + 64 + 160 + 160), 160: 3 * 64}  # inputs -> rows of Linear
LLAMA_LINEAR = sum(columns * rows for columns, rows in LLAMA_ROWS.items())
LLAMA_NORM = (2 * 3 + 1) * 64
# tiny-gpt2: width 64, inner 256, 2 blocks, vocabulary 257, 1024 positions, tied.
GPT2_LINEAR = 2 * 64 * (192 + 64 + 256 + 256)
GPT2_NORM = (2 * 2 + 1) * 64
GPT2_BIAS = 2 * (192 + 64 + 256 + 64) + GPT2_NORM  # each LayerNorm has one too
GPT2_EMBEDDING = (257 + 1024) * 64


@pytest.fixture
def sized(request, tmp_path):
    """Compresses a tiny model, changes it, saves it: (what size says, the folder, the model)."""

    def make(method, family, change=lambda model: None):
        model = compress.apply(method, compress.load(request.getfixturevalue(family)))
        change(model)
        compress.save(model, tmp_path / "artefact")
        return size(subject(artefact=tmp_path / "artefact"), quiet), tmp_path / "artefact", model

    return make


@pytest.mark.parametrize(
    "method, bytes_of_row",
    [
        # codes, bfloat16 scales; zeros in whole groups of 8 codes, as they are packed
        ("rtn(bits=4,group_size=32,symmetric=true)", {64: 32 + 2 * 2, 160: 80 + 5 * 2}),
        ("rtn(bits=4,group_size=32)", {64: 32 + 2 * 2 + 4, 160: 80 + 5 * 2 + 4}),
        ("rtn(bits=3,group_size=32,symmetric=true)", {64: 24 + 2 * 2, 160: 60 + 5 * 2}),
        ("int8_sym", {64: 64 + 2, 160: 160 + 2}),
    ],
)
def test_bits_of_a_quantized_weight_by_hand(method, bytes_of_row, sized):
    values, _, _ = sized(method, "tiny_llama")
    quantized_bytes = sum(LLAMA_ROWS[columns] * count for columns, count in bytes_of_row.items())
    alone = 2 * 257 * 64 + LLAMA_NORM
    assert values["quantized_weights"] == LLAMA_LINEAR
    assert values["bits_per_quantized_weight"] == 8 * quantized_bytes / LLAMA_LINEAR
    assert values["tensor_bytes"] == quantized_bytes + 2 * alone
    assert values["weights"] == LLAMA_LINEAR + alone
    assert values["bits_per_weight"] == 8 * values["tensor_bytes"] / values["weights"]
    json.dumps(values, allow_nan=False)


def test_symmetric_4_bit_groups_of_32_are_the_textbook_4_5_bits(sized):
    values, _, _ = sized("rtn(bits=4,group_size=32,symmetric=true)", "tiny_llama")
    assert values["bits_per_quantized_weight"] == 4 + 16 / 32


def test_an_order_of_columns_is_paid_for_and_is_no_weight(sized):
    def reorder(model):
        model.model.layers[0].mlp.down_proj.order = torch.arange(160, dtype=torch.int32)

    values, _, _ = sized("rtn(bits=4,group_size=32,symmetric=true)", "tiny_llama", reorder)
    assert values["quantized_weights"] == LLAMA_LINEAR
    order_bits = 8 * 4 * 160
    assert values["bits_per_quantized_weight"] == pytest.approx(4.5 + order_bits / LLAMA_LINEAR)
    assert sum(values["left_alone"].values()) == 2 * 257 * 64 + LLAMA_NORM


def test_a_quantized_copy_of_a_tied_head_means_no_new_weights(sized):
    plain, _, _ = sized("none", "tiny_gpt2")
    values, _, _ = sized("rtn(group_size=32,skip=[])", "tiny_gpt2")
    assert values["weights"] == plain["weights"]
    assert values["quantized_weights"] == 2 * 12 * 64**2 + 257 * 64  # two blocks and the head


@pytest.mark.parametrize("bits", [4, 8])
def test_an_embedding_of_codes_means_the_numbers_of_the_embedding(bits, sized):
    plain, _, _ = sized("none", "tiny_gpt2")
    values, _, _ = sized(f"rtn(group_size=32,head_bits={bits})", "tiny_gpt2")
    assert values["weights"] == plain["weights"]
    assert values["left_alone"]["embedding"] == GPT2_EMBEDDING - 257 * 64


def test_what_was_left_alone_by_role(sized):
    assert sized("rtn(group_size=32)", "tiny_llama")[0]["left_alone"] == {
        "embedding": 257 * 64,
        "head": 257 * 64,
        "norm": LLAMA_NORM,
    }
    # The biases of quantized layers are floats too; the tied head is the embedding, once.
    assert sized("rtn(group_size=32)", "tiny_gpt2")[0]["left_alone"] == {
        "embedding": GPT2_EMBEDDING,
        "norm": GPT2_NORM,
        "bias": GPT2_BIAS,
    }


def test_another_librarys_files_count_against_the_parents_weights(tmp_path, tiny_llama, tiny_gpt2):
    (tmp_path / "model.onnx").write_bytes(b"x" * 1000)
    (tmp_path / "config.json").write_bytes(b"{}")
    for name in ("tokenizer.json", "export.json"):
        (tmp_path / name).write_bytes(b"x" * 5000)
    weights = {
        tiny_llama: LLAMA_LINEAR + 2 * 257 * 64 + LLAMA_NORM,
        tiny_gpt2: GPT2_LINEAR + GPT2_NORM + GPT2_BIAS + GPT2_EMBEDDING,  # its head is tied
    }
    for parent, count in weights.items():
        values = size(replace(subject(artefact=tmp_path), made_from=parent), quiet)
        assert values["size_bytes"] == 1002, "the tokenizer is no part of the model"
        assert (values["tensor_bytes"], values["weights"]) == (1000, count)
        assert values["bits_per_weight"] == 8000 / count
    (tmp_path / "model.onnx").rename(tmp_path / "model.bin")
    with pytest.raises(ValueError, match="holds no file of weights"):
        size(replace(subject(artefact=tmp_path), made_from=tiny_llama), quiet)


def test_of_another_librarys_smaller_model_the_weights_that_are_left_count(
    tiny_llama, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "onnx", None)  # as in that library's environment
    ids = random_ids(4, 32)
    left = compress.apply("prune_structured(ratio=0.5)", compress.load(tiny_llama), ids)
    count = sum(each.numel() for each in left.parameters())
    compress.save(left, tmp_path / "left")
    values = size(replace(subject(artefact=tmp_path / "left"), made_from=tiny_llama), quiet)
    assert values["weights"] == count < LLAMA_LINEAR + 2 * 257 * 64 + LLAMA_NORM
    assert values["bits_per_weight"] == 32


def test_of_another_librarys_file_the_tensors_count_and_no_header(tmp_path):
    writer = GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_token_list(["a long word"] * 500)  # a tokenizer is no part of the weights
    writer.add_tensor("a", np.zeros((10, 25), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file({"a": torch.zeros(7, dtype=torch.float16)}, tmp_path / "b.safetensors")
    (tmp_path / "c.safetensors").write_bytes(b"x" * 100)
    assert (tmp_path / "a.gguf").stat().st_size > 5000 + 1000
    assert payload(tmp_path / "a.gguf") == 1000
    assert payload(tmp_path / "b.safetensors") == 14
    with pytest.raises(ValueError, match=r"c\.safetensors is not a safetensors file"):
        payload(tmp_path / "c.safetensors")


@pytest.mark.parametrize("method, bits", [("none", 32), ("cast", 16), ("cast(dtype=float16)", 16)])
@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
def test_plain_models_by_hand(method, bits, family, sized):
    values, _, model = sized(method, family)
    assert values["bits_per_weight"] == bits
    assert (values["quantized_weights"], values["bits_per_quantized_weight"]) == (0, None)
    # parameters() names a shared one once
    assert values["weights"] == sum(parameter.numel() for parameter in model.parameters())
    if family == "tiny_gpt2":
        assert values["weights"] == GPT2_LINEAR + GPT2_NORM + GPT2_BIAS + GPT2_EMBEDDING
        assert "head" not in values["left_alone"]
    else:
        assert values["left_alone"]["head"] == 257 * 64
    linear = {"tiny_llama": LLAMA_LINEAR, "tiny_gpt2": GPT2_LINEAR}[family]
    assert values["left_alone"]["linear"] == linear


@pytest.mark.parametrize("method", ["none", "rtn(group_size=32)", "dynamic"])
def test_bytes_are_those_of_the_files(method, sized):
    values, folder, _ = sized(method, "tiny_gpt2")
    assert values["size_bytes"] == sum(os.path.getsize(file) for file in folder.iterdir())
    weights = (folder / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(weights[:8], "little")  # the format: length, header, tensors
    assert values["tensor_bytes"] == len(weights) - header
    (folder / "more").mkdir()
    (folder / "more" / "notes.txt").write_bytes(1000 * b"x")
    again = size(subject(artefact=folder), quiet)
    assert again == values | {"size_bytes": values["size_bytes"] + 1000}
