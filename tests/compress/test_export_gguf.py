"""gguf: blocks by hand, gguf's own arithmetic, the same model back, tokenizers, refusals."""

import importlib
import json
import struct
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from torch import nn

import compress
from bench import models
from compress.dynamic_linear import Float16Linear
from compress.export import gguf as ours
from compress.export import gguf_blocks, gguf_header
from compress.export.gguf_model import halved, interleaved
from compress.model_files import tie
from compress.quant_embedding import QuantEmbedding
from compress.quant_linear import QuantLinear

export = importlib.import_module("compress.export")  # not the function of that name
SYMMETRIC = "rtn(bits=4,group_size=32,symmetric=true)"
FITTING = (SYMMETRIC, "rtn(group_size=32)", "rtn(bits=3,group_size=32)", "rtn(bits=2)", "int8_sym")


def half(value: float) -> bytes:
    return struct.pack("<e", value)


def layer_of(codes, scale, zero=None, offset=None, bits=4, dtype=torch.float32) -> QuantLinear:
    """One row of one group."""
    scale, zero, offset = (
        None if value is None else torch.tensor([[value]]) for value in (scale, zero, offset)
    )
    return QuantLinear.from_codes(
        torch.tensor([codes]), scale, zero, None, bits, len(codes), dtype=dtype, offset=offset
    )


def bytes_of(layer: QuantLinear) -> bytes:
    return gguf_blocks.to_blocks(layer).numpy().tobytes()


def exported(model, folder, tokenizer=None) -> gguf_header.Header:
    export.export(model, folder / "out", "gguf", tokenizer)
    return gguf_header.parse(folder / "out" / "model.gguf")


def in_float32(model: nn.Module) -> nn.Module:
    """The same weights, computing in float32 as a model that was read does."""
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.scale = module.scale.float()
    return model.float()


def logits(model, ids):
    with torch.inference_mode():
        return model(ids).logits


def with_coded_embedding(model: nn.Module, bits: int) -> nn.Module:
    rtn = compress.get("rtn", bits=bits, group_size=32, symmetric=True, dtype="float32")
    embedding = QuantEmbedding(
        rtn.quantize(model.get_input_embeddings().weight.half().float(), None)
    )
    embedding.table.scale = embedding.table.scale.half().float()
    model.set_input_embeddings(embedding)
    tie(model)
    return model


# Blocks


def test_a_block_of_q8_0_by_hand():
    layer = layer_of([0, 255, 128, 129, *[127] * 28], 0.5, bits=8)
    assert gguf_blocks.kind_of(layer) == "Q8_0"
    assert bytes_of(layer) == half(0.5) + bytes([0x80, 0x7F, 0, 1, *[0xFF] * 28])


def test_a_block_of_q4_0_by_hand():
    layer = layer_of([*range(16), *[9] * 16], 0.25)  # w = 0.25 * (code - 8)
    assert gguf_blocks.kind_of(layer) == "Q4_0"
    assert bytes_of(layer) == half(0.25) + bytes(0x90 + code for code in range(16))


def test_a_block_of_q4_1_by_hand():
    layer = layer_of([*range(16), *[3] * 16], 0.25, zero=2)  # w = 0.25 * code - 0.5
    assert gguf_blocks.kind_of(layer) == "Q4_1"
    assert bytes_of(layer) == half(0.25) + half(-0.5) + bytes(0x30 + code for code in range(16))


def test_a_block_of_q4_1_with_an_offset_by_hand():
    layer = layer_of([*range(16), *[3] * 16], 0.25, offset=-0.375)
    assert bytes_of(layer) == half(0.25) + half(-0.375) + bytes(0x30 + code for code in range(16))


def test_codes_are_turned_round_where_only_that_is_exact():
    scale = 255 / 128  # 8 bits; times 13 it needs 12, times 15 - 13 only 8
    layer = layer_of([*range(16), *[3] * 16], scale, zero=13)
    expected = half(-scale) + half(2 * scale) + bytes(0xC0 + 15 - code for code in range(16))
    assert bytes_of(layer) == expected


def test_every_zero_fits_with_scales_of_8_bits_and_none_is_rounded():
    random = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 16, (2048, 32), generator=random)
    scale = torch.randint(128, 256, (2048, 1), generator=random) / 2.0**14
    zero = torch.randint(0, 16, (2048, 1), generator=random)
    layer = QuantLinear.from_codes(rows, scale, zero, None, 4, 32)
    content = gguf_blocks.to_blocks(layer).numpy()
    found = gguf.dequantize(content, gguf.GGMLQuantizationType.Q4_1)
    assert torch.equal(torch.from_numpy(found), layer.weight(torch.float32))
    assert (content.view(np.float16)[:, 0] < 0).any(), "no block was turned round"


@pytest.mark.parametrize("zero, bits, kind", [(1, 2, "Q4_0"), (5, 3, "Q4_0"), (9, 4, "Q4_1")])
def test_fewer_bits_are_widened(zero, bits, kind):
    layer = layer_of([code % 2**bits for code in range(64)], 0.125, zero=zero, bits=bits)
    assert gguf_blocks.kind_of(layer) == kind
    found = gguf.dequantize(
        gguf_blocks.to_blocks(layer).numpy(), getattr(gguf.GGMLQuantizationType, kind)
    )
    assert torch.equal(torch.from_numpy(found), layer.weight())


@pytest.mark.parametrize("size", [32, 64, 96, 160, -1])
@pytest.mark.parametrize("bits", [4, 8])
def test_groups_are_repeated_block_by_block(bits, size):
    random = torch.Generator().manual_seed(bits)
    rtn = compress.get("rtn", bits=bits, group_size=size, symmetric=True)
    layer = rtn.quantize(torch.randn(8, 160, generator=random), None)  # 96: a short last group
    kind = getattr(gguf.GGMLQuantizationType, gguf_blocks.kind_of(layer))
    found = gguf.dequantize(gguf_blocks.to_blocks(layer).numpy(), kind)
    assert torch.equal(torch.from_numpy(found), layer.weight(torch.float32))


def test_a_block_of_zeros_takes_any_scale():
    layer = layer_of([8] * 32, 1e-30)
    assert bytes_of(layer) == half(0) + bytes([0x88] * 16)


def test_subnormal_scales_are_exact_or_refused():
    assert bytes_of(layer_of([9] * 32, 2.0**-24))[:2] == b"\x01\0"
    with pytest.raises(ValueError, match=r"a scale is 2\.98e-08, too small for float16"):
        bytes_of(layer_of([9] * 32, 2.0**-25))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_blocks_are_read_as_gguf_reads_them(kind):
    random = np.random.default_rng(1)
    blocks = random.integers(0, 256, (6, 5, gguf_blocks.BLOCK_BYTES[kind]), dtype=np.uint8)
    blocks[..., :4] = random.standard_normal((6, 5, 2)).astype(np.float16).view(np.uint8)
    rows = blocks.reshape(6, -1)
    layer = gguf_blocks.from_blocks(kind, torch.from_numpy(rows), None)
    expected = gguf.dequantize(rows, getattr(gguf.GGMLQuantizationType, kind))
    assert torch.equal(layer.weight(torch.float32), torch.from_numpy(expected))
    assert (layer.bits, layer.group_size) == (8 if kind == "Q8_0" else 4, 32)
    assert torch.equal(gguf_blocks.to_blocks(layer), torch.from_numpy(rows)), "and written back"


@pytest.mark.parametrize(
    "layer, message",
    [
        (layer_of([9] * 40, 1.0), "a row has 40 weights, and GGUF's blocks have 32"),
        (layer_of([9] * 32, 1 + 2**-11), "a scale needs 12 bits, float16 has 11"),
        (layer_of([9] * 32, 65536.0), r"a scale is 6\.55e\+04, too large for float16"),
        (
            layer_of([*[0] * 16, *[15] * 16], 1 + 2**-10, zero=5),
            r"scale \* zero needs 13 bits, float16 has 11; symmetric=true would do, or scales",
        ),
        (layer_of([9] * 32, 1.0, offset=1 + 2**-11), "an offset needs 12 bits"),
        (layer_of([9] * 32, 1.0, offset=0.0, bits=8), "8-bit codes with an offset"),
        (layer_of([255] * 32, 1.0, zero=2, bits=8), "8-bit codes with a zero"),
    ],
)
def test_layers_that_no_block_holds(layer, message):
    with pytest.raises(ValueError, match=message):
        gguf_blocks.kind_of(layer)


def test_groups_that_cut_blocks_and_moved_columns_are_refused():
    codes, scale = torch.full((1, 96), 9), torch.ones(1, 2)
    with pytest.raises(ValueError, match="a group has 48 weights, and GGUF's blocks 32"):
        gguf_blocks.kind_of(QuantLinear.from_codes(codes, scale, None, None, 4, 48))
    order = torch.arange(96)
    layer = QuantLinear.from_codes(codes, scale[:, :1], None, None, 4, 96, order=order)
    assert gguf_blocks.kind_of(layer) == "Q4_0"
    layer.order = order.flip(0).int()
    with pytest.raises(ValueError, match="another order"):
        gguf_blocks.kind_of(layer)


def test_rows_change_places_and_back():
    rows = torch.arange(8.0)[:, None]
    assert interleaved(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert torch.equal(halved(interleaved(rows, 2), 2), rows)


# Models


@pytest.mark.parametrize("method", [None, "cast(dtype=float16)", "cast", *FITTING])
def test_the_model_that_is_read_is_the_one_that_was_written(method, model, token_ids, tmp_path):
    if method:
        model = compress.apply(method, model)
    exported(model, tmp_path)
    read = export.read(tmp_path / "out")
    assert torch.equal(logits(read, token_ids), logits(in_float32(model), token_ids))


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_stay_codes(bits, model, tmp_path):
    compress.apply(f"rtn(bits={bits},group_size=32,symmetric=true)", model)
    exported(model, tmp_path)
    read = export.read(tmp_path / "out" / "model.gguf")
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            found = read.get_submodule(name)
            assert (found.bits, found.group_size) == (bits, 32)
            assert torch.equal(found.codes, layer.codes)
            assert torch.equal(found.scale.float(), layer.scale.float())
            assert found.scale.dtype == (torch.float16 if layer.bias is None else torch.float32)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_coded_vocabulary_matrix(bits, model, token_ids, tmp_path):
    tied = model.config.tie_word_embeddings
    header = exported(with_coded_embedding(model, bits), tmp_path)
    assert header.tensors["token_embd.weight"].kind == f"Q{bits}_0"
    assert ("output.weight" in header.tensors) != tied
    read = export.read(tmp_path / "out")
    assert isinstance(read.get_input_embeddings(), QuantEmbedding)
    assert (read.get_output_embeddings() is read.get_input_embeddings().table) == tied
    assert torch.equal(logits(read, token_ids), logits(in_float32(model), token_ids))


def test_float16_layers_and_biases_on_attention(llama, token_ids, tmp_path):
    config = llama.config.to_dict() | {"attention_bias": True, "mlp_bias": True}
    model = type(llama)(type(llama.config)(**config)).eval().requires_grad_(False)
    model.load_state_dict(llama.state_dict(), strict=False)
    random = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.copy_(torch.randn(parameter.shape, generator=random))
    up = model.model.layers[0].mlp.up_proj
    model.model.layers[0].mlp.up_proj = Float16Linear(up.weight.half(), up.bias)
    header = exported(model, tmp_path)
    assert header.tensors["blk.0.ffn_up.weight"].kind == "F16"
    read = export.read(tmp_path / "out")
    assert torch.equal(logits(read, token_ids), logits(model, token_ids))


def test_matrices_keep_their_type_and_vectors_are_float32(model, tmp_path):
    header = exported(compress.apply("cast", model), tmp_path)
    for name, place in header.tensors.items():
        assert place.kind == ("BF16" if len(place.shape) > 1 else "F32"), name
    assert header.metadata["general.file_type"] == gguf.LlamaFileType.MOSTLY_BF16


def test_gguf_s_reader_sees_the_same_file(llama, tmp_path):
    compress.apply("rtn(group_size=32)", llama)
    header = exported(llama, tmp_path)
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert {name: fields[name] for name in header.metadata} == header.metadata
    assert fields["llama.attention.head_count_kv"] == 2
    assert fields["llama.rope.freq_base"] == 10000
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_1
    for tensor in reader.tensors:
        place = header.tensors[tensor.name]
        assert (tensor.tensor_type.name, tensor.data_offset) == (place.kind, place.start)
        assert tuple(tensor.shape[::-1]) == place.shape
        assert tensor.data.tobytes() == bytes(header.bytes_of(tensor.name))
    q_proj = llama.model.layers[1].self_attn.q_proj
    stored = next(tensor for tensor in reader.tensors if tensor.name == "blk.1.attn_q.weight")
    weight = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type))
    assert torch.equal(halved(weight, 4), q_proj.weight(torch.float32))


@pytest.mark.parametrize("kind", ["Q5_0", "Q5_1"])
def test_other_blocks_become_plain_weights(kind, llama, token_ids, tmp_path):
    header = exported(llama, tmp_path)
    name = "blk.0.ffn_up.weight"
    blocks = gguf.quantize(
        llama.model.layers[0].mlp.up_proj.weight.numpy(), gguf.GGMLQuantizationType[kind]
    )
    rewritten(tmp_path, header, {name: (kind, blocks)})
    read = export.read(tmp_path / "new.gguf")
    weight = torch.from_numpy(gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind]))
    assert torch.equal(read.model.layers[0].mlp.up_proj.weight, weight)


def test_positions_in_blocks_become_plain_weights(gpt2, tmp_path):
    header = exported(gpt2, tmp_path)
    kind = gguf.GGMLQuantizationType.Q8_0
    blocks = gguf.quantize(gpt2.transformer.wpe.weight.numpy(), kind)
    file = rewritten(tmp_path, header, {"position_embd.weight": ("Q8_0", blocks)})
    weight = torch.from_numpy(gguf.dequantize(blocks, kind))
    assert torch.equal(export.read(file).transformer.wpe.weight, weight)


def rewritten(folder, header, tensors=(), values=(), without=(), file="new.gguf"):
    """The file of `header` again, with some tensors (kind, blocks) and values replaced."""
    entries = []
    for name, place in header.tensors.items():
        kind, content = place.kind, np.frombuffer(header.bytes_of(name), np.uint8)
        kind, content = dict(tensors).get(name, (kind, content))
        made = torch.from_numpy(np.ascontiguousarray(content).view(np.uint8).copy())
        if name not in without:
            entries.append(gguf_header.NewTensor(name, kind, place.shape, lambda made=made: made))
    metadata = {
        key: list(value) if not isinstance(value, int | float | str) else value
        for key, value in (header.metadata | dict(values)).items()
    }
    kept = {key: value for key, value in metadata.items() if value != []}
    gguf_header.write(folder / file, kept, entries)
    return folder / file


def test_a_matrix_that_stands_twice_is_tied(gpt2, token_ids, tmp_path):
    header = exported(gpt2, tmp_path)
    places = dict(header.tensors)
    places["output.weight"] = places["token_embd.weight"]
    file = rewritten(tmp_path, gguf_header.Header(header.metadata, places, header.data))
    read = export.read(file)
    assert read.lm_head.weight is read.transformer.wte.weight
    assert torch.equal(logits(read, token_ids), logits(gpt2, token_ids))


def test_smollm2_with_its_tokenizer(smollm2, token_ids, tmp_path):
    model = compress.load(smollm2)
    compress.apply("rtn(group_size=32)", model)
    header = exported(model, tmp_path, smollm2)
    assert header.metadata["tokenizer.ggml.pre"] == "smollm"
    assert len(header.metadata["tokenizer.ggml.tokens"]) == 49152
    assert header.metadata["tokenizer.ggml.tokens"][:3] == [
        *("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    ]
    assert header.metadata["tokenizer.ggml.merges"][0] == "Ġ t"
    assert len(header.metadata["tokenizer.ggml.merges"]) == 48900
    assert list(header.metadata["tokenizer.ggml.token_type"]).count(3) == 17
    ids = [header.metadata[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding")]
    assert ids == [1, 2, 2]
    assert header.metadata["tokenizer.ggml.add_bos_token"] is False
    assert "<|im_start|>" in header.metadata["tokenizer.chat_template"]
    read = export.read(tmp_path / "out")
    ids = token_ids[:1, :16]  # as many as rebuild the weight: fewer add offsets in another order
    assert torch.equal(logits(read, ids), logits(in_float32(model), ids))


@pytest.mark.parametrize("method", [None, "rtn(group_size=32)", SYMMETRIC, "int8_sym"])
def test_the_model_is_the_one_that_transformers_reads(method, model, request, token_ids, tmp_path):
    source = request.getfixturevalue(f"tiny_{model.config.model_type}")
    if method:
        compress.apply(method, model)
    exported(with_coded_embedding(model, 8), tmp_path, source)
    # Dequantised to float32, whole, by gguf's and transformers' own code.
    theirs = compress.load(models.resolve(str(tmp_path / "out" / "model.gguf")).folder)
    found, expected = (logits(m, token_ids) for m in (export.read(tmp_path / "out"), theirs))
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


# Tokenizers


def test_the_tiny_models_tokenizer(model, request, tmp_path):
    folder = request.getfixturevalue(f"tiny_{model.config.model_type}")
    exported(model, tmp_path, folder)
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = [*sorted(vocabulary, key=vocabulary.get), "<|endoftext|>"]
    assert fields["tokenizer.ggml.tokens"] == tokens
    assert fields["tokenizer.ggml.token_type"] == [1] * 256 + [3]
    assert fields["tokenizer.ggml.merges"] == []  # there, since llama.cpp insists
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert fields["tokenizer.ggml.bos_token_id"] == fields["tokenizer.ggml.eos_token_id"] == 256
    assert "tokenizer.ggml.unknown_token_id" not in fields
    assert fields["tokenizer.ggml.add_bos_token"] is False


def test_transformers_reads_the_tokenizer_back(llama, tiny_llama, tmp_path):
    from transformers import AutoTokenizer

    exported(llama, tmp_path, tiny_llama)
    read = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    text = "Grüße,  12 Uhr.\n\n\t日本 don't"
    assert read(text).input_ids == AutoTokenizer.from_pretrained(tiny_llama)(text).input_ids


def test_without_a_tokenizer_the_file_takes_numbers_only(llama, tmp_path):
    header = exported(llama, tmp_path)
    assert header.metadata["tokenizer.ggml.model"] == "no_vocab"
    assert header.metadata["llama.vocab_size"] == 257


def tokenizer_folder(source, folder, **changes):
    """A copy of the tokenizer in `source` with changes under "model" and beside it."""
    folder.mkdir()
    about = json.loads((source / "tokenizer.json").read_text())
    about["model"] |= changes.pop("model", {})
    (folder / "tokenizer.json").write_text(json.dumps(about | changes))
    (folder / "tokenizer_config.json").write_text((source / "tokenizer_config.json").read_text())
    return folder


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
END = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
TEXT = {"Sequence": {"id": "A", "type_id": 0}}


def ends(single):
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [TEXT, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [256], "tokens": ["<|endoftext|>"]}
        },
    }


@pytest.mark.parametrize(
    "single, expected",
    [([END, TEXT], (True, False)), ([TEXT, END], (False, True)), ([END, TEXT, END], (True, True))],
)
def test_what_a_tokenizer_adds_by_itself(single, expected, llama, tiny_llama, tmp_path):
    folder = tokenizer_folder(tiny_llama, tmp_path / "tokenizer", post_processor=ends(single))
    values = exported(llama, tmp_path, folder).metadata
    added = values["tokenizer.ggml.add_bos_token"], values["tokenizer.ggml.add_eos_token"]
    assert added == expected


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"pre_tokenizer": BYTE_LEVEL | {"use_regex": True}}, "no name for its way of splitting"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "not a byte-level BPE"),
        ({"normalizer": {"type": "NFC"}}, "no name for its normalizer"),
        ({"model": {"ignore_merges": True}}, "no name for its ignore_merges"),
        ({"model": {"byte_fallback": True}}, "GGUF needs its tokenizer.model, too"),
        ({"model": {"merges": 5}}, "is not a tokenizer"),
        ({"post_processor": ends([END, END, TEXT])}, "adds tokens to a text that GGUF cannot say"),
    ],
)
def test_tokenizers_that_llama_cpp_has_no_equal_of(changes, message, llama, tiny_llama, tmp_path):
    folder = tokenizer_folder(tiny_llama, tmp_path / "tokenizer", **changes)
    with pytest.raises(ValueError, match=message):
        exported(llama, tmp_path, folder)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_without_an_end_or_with_too_many_tokens(llama, tiny_llama, tmp_path):
    folder = tokenizer_folder(tiny_llama, tmp_path / "tokenizer")
    (folder / "tokenizer_config.json").write_text("{}")
    exported(llama, tmp_path, folder)  # config.json names it
    llama.config.eos_token_id = None
    with pytest.raises(ValueError, match="names no token that ends a text"):
        ours.write(llama, tmp_path, folder)
    llama.config.vocab_size = 200
    with pytest.raises(ValueError, match="token 256 is none of the model's 200"):
        ours.write(llama, tmp_path, folder)
    with pytest.raises(ValueError, match=r"holds no tokenizer\.json and no tokenizer\.model"):
        ours.write(llama, tmp_path, tmp_path)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """Makes folders with a small SentencePiece model, as Llama's is but for `changes`."""
    import sentencepiece

    def make(**changes):
        folder = tmp_path_factory.mktemp("pieces")
        settings = {
            "model_type": "bpe",
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "vocab_size": 257 + 4 + 15,
            "minloglevel": 2,
        }
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["the cat sat on the mat"] * 20),
            model_prefix=str(folder / "tokenizer"),
            **settings | changes,
        )
        return folder

    return make


def test_a_sentencepiece_model(pieces, llama, tmp_path):
    import sentencepiece

    folder = pieces()
    llama.config.vocab_size = 300
    llama.config.eos_token_id = 2
    llama.model.embed_tokens.weight.data = torch.zeros(300, 64)
    llama.lm_head.weight.data = torch.zeros(300, 64)
    values = exported(llama, tmp_path, folder).metadata
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    count = model.vocab_size()
    tokens = [model.id_to_piece(index) for index in range(count)]
    assert values["tokenizer.ggml.model"] == "llama"
    assert values["tokenizer.ggml.tokens"][:count] == tokens
    assert values["tokenizer.ggml.tokens"][count] == f"[PAD{count}]"
    scores = [model.get_score(index) for index in range(count)]
    assert list(values["tokenizer.ggml.scores"]) == scores + [0.0] * (300 - count)
    types = list(values["tokenizer.ggml.token_type"])
    assert types[:4] == [2, 3, 3, 6]  # unknown, begin, end, the first byte
    assert types.count(6) == 256 and types[count:] == [5] * (300 - count)
    assert values["tokenizer.ggml.add_space_prefix"] is True
    assert values["tokenizer.ggml.add_bos_token"] is True


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "unigram", "vocab_size": 275, "hard_vocab_limit": False}, "model_type=bpe"),
        ({"byte_fallback": False, "vocab_size": 20}, "byte_fallback=true"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalization_rule_name=identity"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces=false"),
    ],
)
def test_sentencepiece_that_llama_cpp_reads_otherwise(pieces, changes, message, llama, tmp_path):
    with pytest.raises(ValueError, match=message):
        ours.write(llama, tmp_path, pieces(**changes))


def test_a_broken_sentencepiece_model(llama, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\xff" * 20)
    with pytest.raises(ValueError, match=r"tokenizer\.model is not a SentencePiece model"):
        ours.write(llama, tmp_path, tmp_path)


# Refusals


@pytest.mark.parametrize(
    "method, message",
    [
        ("int8_asym", "8-bit codes with a zero; GGUF's are symmetric: symmetric=true would do"),
        ("rtn(group_size=32,dtype=float16)", r"scale \* zero needs \d+ bits, float16 has 11"),
        ("rtn(group_size=48)", "a group has 48 weights"),
        ("dynamic", "no layer that computes as 'int8_dynamic' does"),
    ],
)
def test_models_that_gguf_cannot_hold(method, message, model, tmp_path):
    compress.apply(method, model)
    first = {"llama": r"model\.layers\.0\.self_attn\.q_proj", "gpt2": r"transformer\.h\.0\.attn"}
    reason = ours.refusal(model)
    assert reason is not None
    with pytest.raises(
        ValueError,
        match=f"gguf cannot hold this model: {first[model.config.model_type]}.*{message}",
    ):
        export.export(model, tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "family, changes, message",
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; GGUF presumes 'silu'"),
        ("gpt2", {"activation_function": "gelu"}, "activation_function is 'gelu'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "no conversion of rope_type 'linear'",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ("llama", {"model_type": "bert"}, "no GGUF of 'bert' here"),
        ("llama", {"intermediate_size": None}, "intermediate_size is None, not a size"),
        ("gpt2", {"n_embd": 0}, "n_embd is 0, not a size"),
        ("gpt2", {"layer_norm_epsilon": None}, "layer_norm_epsilon is None, not a number"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.1}},
            "rope_theta 10000.1 is not exact",
        ),
    ],
)
def test_settings_that_gguf_cannot_say(family, changes, message, request):
    model = request.getfixturevalue(family)
    config = model.config.to_dict() | changes
    model.config = SimpleNamespace(to_dict=lambda: config)
    assert message in (ours.refusal(model) or "")


def test_tensors_without_a_place_are_refused(llama):
    llama.model.extra = nn.Linear(64, 64)
    assert ours.refusal(llama) == "no place in GGUF for model.extra.weight"


def test_tensors_of_other_types_are_refused(llama):
    llama.model.layers[0].mlp.up_proj.weight.data = torch.zeros(160, 64, dtype=torch.float64)
    assert "up_proj.weight holds torch.float64" in (ours.refusal(llama) or "")


def test_what_it_recognises(llama, tmp_path):
    exported(llama, tmp_path)
    assert ours.recognises(tmp_path / "out") and ours.recognises(tmp_path / "out" / "model.gguf")
    assert export.format_of(tmp_path / "out") == "gguf"
    assert not ours.recognises(tmp_path) and not ours.recognises(tmp_path / "nowhere")
    (tmp_path / "out" / "config.json").write_text("{}")
    assert not ours.recognises(tmp_path / "out")
    (tmp_path / "out" / "config.json").unlink()
    (tmp_path / "out" / "second.gguf").write_bytes(b"GGUF")
    assert not ours.recognises(tmp_path / "out")
