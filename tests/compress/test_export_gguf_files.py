"""gguf: whatever is cut short, malformed, huge or unknown is one ValueError that names the file."""

import importlib
import os
import struct
import tracemalloc

import pytest
import torch
from fuzzing import fuzz
from fuzzing_gguf import mutated

import compress
from compress.export import gguf_header

export = importlib.import_module("compress.export")  # not the function of that name
UINT32, INT32, BOOL, STRING, ARRAY = 4, 5, 7, 8, 9
F32, Q4_0, Q8_0, I32 = 0, 2, 8, 26
HUGE = 2**60


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def value(key: bytes, kind: int, content: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + content


def tensor(name=b"a", shape=(32,), kind=F32, offset=0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def file_of(values=(), tensors=(), data=bytes(256), version=3, counts=None, magic=b"GGUF") -> bytes:
    counts = counts or (len(tensors), len(values))
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join([*values, *tensors])
    return head + bytes(-len(head) % 32) + data


def alignment(value_: int, kind: int = UINT32) -> bytes:
    return value(b"general.alignment", kind, struct.pack("<I" if kind == UINT32 else "<Q", value_))


def refused(path, message):
    with pytest.raises(ValueError, match=message) as caught:
        export.formats()["gguf"].read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.fixture(scope="module")
def good(tiny_llama, tmp_path_factory):
    """A file of a small Llama with Q4_1 and a tokenizer."""
    model = compress.apply("rtn(group_size=32)", compress.load(tiny_llama))
    folder = tmp_path_factory.mktemp("good")
    export.export(model, folder / "out", "gguf", tiny_llama)
    return folder / "out" / "model.gguf"


def test_a_file_by_hand(tmp_path):
    data = bytes(range(64)) + bytes(34)
    values = [
        value(b"n", 10, struct.pack("<Q", HUGE)),
        value(b"yes", BOOL, b"\1"),
        value(b"name", STRING, text("é".encode())),
        value(b"list", ARRAY, struct.pack("<IQ", STRING, 2) + text(b"x") + text(b"")),
        value(b"numbers", ARRAY, struct.pack("<IQ3h", 3, 3, -1, 0, 7)),
        value(b"none", ARRAY, struct.pack("<IQ", STRING, 0)),
    ]
    tensors = [tensor(b"b", (32, 1), Q8_0, 64), tensor(b"a", (4, 2, 2), F32, 0)]
    (tmp_path / "m").write_bytes(file_of(values, tensors, data))
    header = gguf_header.parse(tmp_path / "m")
    assert header.metadata["n"] == HUGE and header.metadata["yes"] is True
    assert (header.metadata["name"], header.metadata["list"]) == ("é", ["x", ""])
    assert list(header.metadata["numbers"]) == [-1, 0, 7] and header.metadata["none"] == []
    assert header.tensors["a"].shape == (2, 2, 4) and header.tensors["b"].shape == (1, 32)
    assert bytes(header.bytes_of("a")) == data[:64] and bytes(header.bytes_of("b")) == data[64:98]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is not a GGUF file"),
        (b"GGU", "is not a GGUF file"),
        (file_of(magic=b"GGML"), "is not a GGUF file"),
        (b"GGUF", "the version would end after the file"),
        (file_of(version=1), "version 1, not one of"),
        (file_of(version=4), "version 4, not one of"),
        (file_of(version=3 << 24), "version 50331648"),  # a big-endian file
        (file_of(counts=(HUGE, 0)), f"the number of tensors, {HUGE}, is more than the file"),
        (file_of(counts=(0, HUGE)), f"the number of values, {HUGE}, is more than the file"),
        (file_of(counts=(2**64 - 1, 2**64 - 1)), "is more than the file"),
        # values
        (file_of([text(b"k", HUGE)]), "a key is longer than 65535 bytes"),
        (file_of([text(b"k", 60000)]), "a key would end after the file"),
        (file_of([value(b"", 0, b"\1")]), "a key is empty"),
        (file_of([value(b"\xff", 0, b"\1")]), "a key is not UTF-8"),
        (file_of([value(b"k", 0, b"\1")] * 2), "the key 'k' stands twice"),
        (file_of([value(b"k", 13, b"\1")]), "the value of 'k' is of unknown type 13"),
        (file_of([value(b"k", BOOL, b"\2")]), "the value of 'k' is neither true nor false"),
        (file_of([value(b"k", STRING, text(b"", HUGE))]), "the value of 'k' would end after"),
        (file_of([value(b"k", STRING, text(b"\xc3"))]), "the value of 'k' is not UTF-8"),
        (
            file_of([value(b"k", ARRAY, struct.pack("<IQ", STRING, HUGE))]),
            f"the length of the value of 'k', {HUGE}, is more than the file",
        ),
        (
            file_of([value(b"k", ARRAY, struct.pack("<IQ", 0, HUGE))]),
            f"the length of the value of 'k', {HUGE}, is more than the file",
        ),
        (
            file_of([value(b"k", ARRAY, struct.pack("<IQIQ", ARRAY, 1, 0, 1))]),
            "the value of 'k' is of unknown type 9",  # an array of arrays
        ),
        (file_of([alignment(0)]), "general.alignment is 0, no power of two"),
        (file_of([alignment(33)]), "general.alignment is 33, no power of two"),
        (file_of([alignment(2**31)]), "general.alignment is 2147483648, no power of two"),
        (file_of([value(b"general.alignment", STRING, text(b"32"))]), "alignment is '32', no"),
        # tensors
        (file_of(tensors=[tensor(b"")]), "a tensor has no name"),
        (file_of(tensors=[tensor(b"x" * 65)]), "the name of tensor 0 is longer than 64 bytes"),
        (file_of(tensors=[tensor(b"\xff")]), "the name of tensor 0 is not UTF-8"),
        (file_of(tensors=[tensor(), tensor(offset=128)]), "tensor 'a' stands twice"),
        (file_of(tensors=[tensor(shape=())]), "tensor 'a' has 0 dimensions"),
        (file_of(tensors=[tensor(shape=(1,) * 5)]), "tensor 'a' has 5 dimensions"),
        (file_of(tensors=[tensor(shape=(0,))]), r"tensor 'a' cannot be \(0,\) of type F32"),
        (file_of(tensors=[tensor(shape=(4, 0))]), r"tensor 'a' cannot be \(0, 4\) of type F32"),
        (file_of(tensors=[tensor(shape=(33,), kind=Q4_0)]), r"cannot be \(33,\) of type Q4_0"),
        (file_of(tensors=[tensor(shape=(2**64 - 32,))]), "not aligned, or outside the file"),
        (file_of(tensors=[tensor(shape=(2**32,) * 4)]), "not aligned, or outside the file"),
        (file_of(tensors=[tensor(kind=4)]), "tensor 'a' is of unknown type 4"),
        (file_of(tensors=[tensor(kind=2**31)]), "tensor 'a' is of unknown type 2147483648"),
        (file_of(tensors=[tensor(offset=4)]), "tensor 'a' at 4 is not aligned"),
        (file_of(tensors=[tensor(offset=HUGE)]), "not aligned, or outside the file"),
        (file_of(tensors=[tensor(offset=2**64 - 32)]), "outside the file"),  # negative, if signed
        (file_of(tensors=[tensor(offset=160)]), "outside the file"),  # its last 32 bytes
        (file_of(tensors=[tensor(), tensor(b"b", offset=96)]), "tensor 'b' overlaps another"),
        (file_of(tensors=[tensor(), tensor(b"b")]), "overlaps another"),
        # a sound file that is no model
        (file_of(), "holds a 'None' model; give a llama or gpt2 one"),
    ],
)
def test_headers_that_lie(content, message, good, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    gguf_header.parse(good)  # what it imports is not counted
    tracemalloc.start()
    refused(path, message)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 100_000  # bytes: an error and its traceback


def test_every_place_where_a_header_may_be_cut(tmp_path):
    values = [
        value(b"n", UINT32, bytes(4)),
        value(b"s", STRING, text(b"abc")),
        value(b"l", ARRAY, struct.pack("<IQ", STRING, 2) + text(b"x") + text(b"y")),
        value(b"m", ARRAY, struct.pack("<IQ3i", INT32, 3, 1, 2, 3)),
    ]
    whole = file_of(values, [tensor(b"a", (8, 2)), tensor(b"b", (32,), Q8_0, 64)], bytes(98))
    path = tmp_path / "m.gguf"
    path.write_bytes(whole)
    assert gguf_header.parse(path).tensors.keys() == {"a", "b"}
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refused(path, "corrupt or truncated" if length >= 4 else "is not a GGUF file")


def changed(good, tmp_path, **values):
    """The file with other values (dots are written __); None takes one out."""
    header = gguf_header.parse(good)
    named = {key.replace("__", "."): value for key, value in values.items()}
    metadata = {
        key: list(value) if type(value).__name__ == "array" else value
        for key, value in (header.metadata | named).items()
        if value is not None
    }
    return header, metadata, tmp_path / "m.gguf"


def write_again(header, metadata, path, kinds=None, without=(), shapes=None, more=()):
    tensors = []
    for name, place in header.tensors.items():
        if name in without:
            continue
        content = torch.frombuffer(bytearray(header.bytes_of(name)), dtype=torch.uint8)
        kind, content = (kinds or {}).get(name, (place.kind, content))
        shape = (shapes or {}).get(name, place.shape)
        made = gguf_header.NewTensor(name, kind, shape, lambda content=content: content)
        tensors.append(made)
    gguf_header.write(path, metadata, [*tensors, *more])
    return path


@pytest.mark.parametrize(
    "values, message",
    [
        ({"general__architecture": "mamba"}, "holds a 'mamba' model; give a llama or gpt2 one"),
        ({"general__architecture": 5}, "holds a '5' model"),
        ({"split__count": 2}, "is one part of several; join them"),
        ({"llama__block_count": None}, "block_count must be a positive whole number, not 'None'"),
        ({"llama__block_count": 0}, "block_count must be a positive whole number, not 0"),
        ({"llama__block_count": True}, "block_count must be a positive whole number, not True"),
        ({"llama__block_count": 2**31}, "block_count must be a positive whole number"),
        ({"llama__block_count": 3.0}, r"block_count must be a positive whole number, not 3\.0"),
        ({"llama__block_count": "x\ny" * 99}, "block_count must be a positive whole number"),
        ({"llama__block_count": [3]}, "block_count must be a positive whole number"),
        ({"llama__block_count": 4}, "too few tensors for 4 blocks"),
        ({"llama__block_count": 2}, "unknown tensor 'blk.2."),
        ({"llama__context_length": 0}, "context_length must be"),
        ({"llama__embedding_length": 128}, "m.gguf"),
        ({"llama__embedding_length": 2**30}, "does not fit the weights"),
        ({"llama__feed_forward_length": 64}, r"shape \(160, 64\), not \(64, 64\)"),
        ({"llama__attention__head_count": 3}, "even width of a head"),
        ({"llama__attention__head_count_kv": 3}, "no multiple of attention.head_count_kv"),
        ({"llama__attention__head_count_kv": 4}, r"attn_k.weight has shape \(32, 64\)"),
        # without the key, each head has keys of its own
        ({"llama__attention__head_count_kv": None}, r"attn_k.weight has shape \(32, 64\)"),
        ({"llama__attention__key_length": 32}, "even width of a head"),
        ({"llama__rope__dimension_count": 8}, "even width of a head"),
        ({"llama__rope__freq_base": -1.0}, "rope.freq_base must be a positive number"),
        ({"llama__rope__freq_base": float("nan")}, "rope.freq_base must be a positive number"),
        ({"llama__rope__freq_base": 5}, "rope.freq_base must be a positive number, not 5"),
        (
            {"llama__rope__scaling__type": "yarn"},
            "'rope.scaling.type'? is 'yarn', which is not known",
        ),
        ({"llama__rope__scaling__factor": 2.0}, r"is 2\.0, which is not known here"),
        ({"llama__logit_scale": 2.0}, "logit_scale'? is 2.0, which is not known here"),
        ({"llama__expert_count": 8}, "expert_count'? is 8, which is not known here"),
        ({"llama__attention__layer_norm_rms_epsilon": None}, "epsilon must be a positive number"),
        ({"llama__vocab_size": 256}, "vocab_size 256 is not that of token_embd.weight"),
        ({"tokenizer__ggml__eos_token_id": 257}, "eos_token_id is 257, no token of 257"),
        ({"tokenizer__ggml__bos_token_id": "1"}, "bos_token_id is '1', no token of 257"),
    ],
)
def test_values_that_make_no_model(values, message, good, tmp_path):
    refused(write_again(*changed(good, tmp_path, **values)), message)


def test_a_key_with_a_line_break_stays_on_one_line(good, tmp_path):
    header, metadata, path = changed(good, tmp_path)
    refused(write_again(header, metadata | {"llama.a\nb": 1}, path), "is 1, which is not known")


def test_a_head_of_odd_width(good, tmp_path):
    values = dict.fromkeys(("key_length", "value_length"), None)
    values = {f"llama__attention__{key}": value for key, value in values.items()}
    values |= {"llama__rope__dimension_count": None, "llama__attention__head_count": 64}
    refused(write_again(*changed(good, tmp_path, **values)), "even width of a head")


def test_values_that_say_what_is_so_anyway(good, tmp_path):
    values = {"llama__rope__scaling__type": "none", "llama__expert_count": 0}
    values |= {"llama__vocab_size": None, "llama__attention__key_length": None}
    path = write_again(*changed(good, tmp_path, **values))
    assert export.read(path).config.vocab_size == 257


def floats(*shape):
    return torch.ones(shape).view(torch.uint8)


def test_tensors_that_make_no_model(good, tmp_path):
    header, metadata, path = changed(good, tmp_path)
    up, norm = "blk.0.ffn_up.weight", "blk.0.ffn_norm.weight"

    def again(**changes):
        return write_again(header, metadata, path, **changes)

    refused(again(without=[up]), "lacks the tensor blk.0.ffn_up.weight")
    refused(again(without=["token_embd.weight"]), "lacks the tensor token_embd.weight")
    refused(again(without=["blk.0.attn_q.weight"]), "lacks the tensor blk.0.attn_q.weight")
    more = [gguf_header.NewTensor("rope_freqs.weight", "F32", (8,), lambda: floats(8))]
    refused(again(more=more), "has an unknown tensor 'rope_freqs.weight'")
    refused(again(shapes={up: (64, 160)}), r"ffn_up.weight has shape \(64, 160\), not \(160, 64\)")
    refused(again(shapes={up: (160, 64, 1)}, kinds={up: ("F32", floats(160, 64))}), "has shape")
    refused(
        again(kinds={norm: ("Q8_0", torch.zeros(68, dtype=torch.uint8))}), "is a vector of type Q8"
    )
    refused(again(kinds={norm: ("I32", floats(64))}), "is a vector of type I32")
    refused(again(kinds={up: ("I32", floats(160, 64))}), "is of type I32, which cannot be read")
    infinite = torch.full((160 * 2 * 20,), 0x7C, dtype=torch.uint8)  # d = m = infinity, in float16
    infinite = infinite.view(-1, 20).index_fill(1, torch.tensor([0, 2]), 0).flatten()
    refused(again(kinds={up: ("Q4_1", infinite)}), "ffn_up.weight: the scale holds NaN or infinity")
    infinite = torch.zeros(160 * 2, 22, dtype=torch.uint8)
    infinite[:, 1], infinite[:, 2:6] = 0x7C, 0xFF  # infinity times 16 - 16, in numpy
    refused(again(kinds={up: ("Q5_0", infinite.flatten())}), "ffn_up.weight holds NaN or infinity")


def test_gpt2_whose_positions_are_not_those_of_its_context(tiny_gpt2, tmp_path):
    export.export(compress.load(tiny_gpt2), tmp_path / "out", "gguf")
    header, metadata, path = changed(tmp_path / "out" / "model.gguf", tmp_path)
    metadata["gpt2.context_length"] = 2048
    refused(write_again(header, metadata, path), "context_length is not that of position_embd")


def test_places_that_are_no_file(good, tmp_path):
    refused(tmp_path / "nowhere.gguf", "is not a file")
    os.mkfifo(tmp_path / "pipe.gguf")
    refused(tmp_path / "pipe.gguf", "is not a file")
    refused(tmp_path, "is not a file|leads out")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds 0 GGUF files, not one")


def test_a_link_out_of_the_folder(good, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model.gguf").symlink_to(good)
    refused(folder, r"model\.gguf leads out of its folder")
    export.read(folder / "model.gguf")  # whoever names the link means it
    (folder / "model.gguf").unlink()
    (folder / "blob").write_bytes(good.read_bytes())
    (folder / "model.gguf").symlink_to("blob")
    export.read(folder)


def test_damaged_files_are_refused_or_read(good, tmp_path):
    export.export(export.read(good), tmp_path / "bare", "gguf")  # no tokens: sizes and places first
    for file in (good, tmp_path / "bare" / "model.gguf"):
        seen, _ = fuzz(file, export.formats()["gguf"].read, 200, mutate=mutated)
        assert seen["refused"] > 80 and seen["read"] > 10
