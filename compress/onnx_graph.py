"""A model as an ONNX graph with a cache of keys and values, for any batch and length.

Inputs and outputs go by the names that transformers' exports use: input_ids, attention_mask
(batch, past + seq), position_ids (batch, seq), past_key_values.N.key and .value
(batch, key heads, past, width), num_logits_to_keep (how many of the last positions get logits, 0
for all; may be left out); logits, present.N.key and .value. The past may be empty; prompts of
unequal length are padded on the left. The numbers lie in a file of their own beside the graph, so
that there is no limit of 2 GB.

torch.onnx traces transformers' own forward pass; what ONNX has an operator for (attention with a
past, rotation, RMSNorm, products of codes) is that operator: see onnx_tracing.py, onnx_layers.py.
"""

from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.onnx.ops import symbolic

from compress.layers import family
from compress.model_files import CONFIG, head_name, our_layers, plain_tensors
from compress.onnx_layers import Codes, operators, table_of
from compress.onnx_tracing import NAME as ATTENTION
from compress.onnx_tracing import Past, tracing

GRAPH, NUMBERS = "model.onnx", "model.onnx_data"
OPSET = 23  # the first with attention and RMSNorm
KEEP = "num_logits_to_keep"
WEIGHTS = "slimbench.weights"  # in the graph's metadata: how many numbers its tensors mean
EXAMPLE = {"batch": 2, "past": 3, "seq": 5}  # of the trace: neither 0 nor 1, nor equal


class Graph(nn.Module):
    """`model`, whose layers are ONNX operators, as a function of tensors alone."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        self.last: Tensor
        self.axis: Tensor
        self.register_buffer("last", torch.tensor([2**63 - 1]))
        self.register_buffer("axis", torch.tensor([1]))

    def forward(
        self, ids: Tensor, mask: Tensor, positions: Tensor, past: list[Tensor], keep: Tensor
    ) -> tuple[Tensor, ...]:
        """Logits, then the past, longer; see the file's head for names and shapes."""
        batch, seq = ids.shape
        before, dtype = past[0].shape[2], past[0].dtype
        # The same mask; but that it is as long as past and seq together is known from here on.
        known = symbolic("Identity", (mask,), dtype=mask.dtype, shape=(batch, before + seq))
        causal = torch.arange(before + seq)[None] <= (torch.arange(seq) + before)[:, None]
        allowed = causal[None, None] & (known[:, None, None] != 0)
        low = torch.tensor(torch.finfo(dtype).min, dtype=dtype)
        held = Past(past)
        hidden = self.model.base_model(
            ids,
            attention_mask=torch.where(allowed, torch.zeros((), dtype=dtype), low),
            position_ids=positions,
            past_key_values=held,
            use_cache=True,
            held=held,
        ).last_hidden_state
        # Declared as long as it was: how many stay is known when it runs.
        inputs = (hidden, -keep.reshape(1), self.last, self.axis)
        hidden = symbolic("Slice", inputs, dtype=dtype, shape=hidden.shape)
        head = self.model.get_output_embeddings()
        if head is None:
            table = self.model.get_input_embeddings().weight  # once in the file, not transposed
            logits = hidden @ table.to(dtype).T
        else:
            logits = head(hidden)
        return logits.float(), *held.tensors


def prepared(model: Any, dtype: torch.dtype, accuracy_level: int) -> Graph:
    """`model`, used up, with operators for layers, computing in `dtype`.

    Raises ValueError, naming the layer, for one that no operator of ONNX means.
    """
    model.config._attn_implementation = ATTENTION
    embeddings = family(model).embeddings
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if isinstance(embedding, nn.Embedding) and head.weight is embedding.weight:
        model.set_output_embeddings(None)
    stands: dict[int, nn.Module] = {}
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if name.startswith(tuple(f"{each}." for each in embeddings)):
            continue  # the codes inside: of the embedding as a whole, below
        try:
            made = operators(layer, accuracy_level)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if made is not None:
            stands[id(layer)] = made
            model.set_submodule(name, made)
    for name in embeddings:
        layer = model.get_submodule(name)
        codes = stands.get(id(getattr(layer, "table", None)))
        assert codes is None or isinstance(codes, Codes)
        model.set_submodule(name, table_of(layer, dtype, codes))
    for parameter in model.parameters():  # norms: what is not ours
        parameter.data = parameter.data.to(dtype)
    return Graph(model).eval()


@dataclass
class Exported:
    """A model as a graph. graph: onnx_ir.Model. config: transformers' own, of the model."""

    graph: Any
    config: Any

    def save(self, folder: Path | str) -> None:
        """Write model.onnx, model.onnx_data with the numbers, and config.json."""
        import onnx_ir

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        onnx_ir.save(self.graph, folder / GRAPH, external_data=NUMBERS)
        self.config.to_json_file(folder / CONFIG)


def export(model: Any, dtype: torch.dtype, accuracy_level: int) -> Exported:
    """`model`, used up, as a graph that computes in `dtype`.

    accuracy_level: of MatMulNBits. Raises ValueError, naming the layer, for one that no operator of
    ONNX means.
    """
    import onnx_ir

    shapes, weights = past_shapes(model), meant(model)
    graph = prepared(model, dtype, accuracy_level)
    batch, past, seq = (EXAMPLE[name] for name in ("batch", "past", "seq"))
    inputs = {
        "ids": torch.zeros(batch, seq, dtype=torch.int64),
        "mask": torch.ones(batch, past + seq, dtype=torch.int64),
        "positions": past + torch.arange(seq).repeat(batch, 1),
        "past": [torch.zeros(batch, heads, past, width, dtype=dtype) for heads, width in shapes],
        "keep": torch.tensor(0),
    }
    rows = {0: "batch", 1: "seq"}
    axes = {
        "ids": rows,
        "mask": {0: "batch", 1: "total"},
        "positions": rows,
        "past": [{0: "batch", 2: "past"} for _ in shapes],
        "keep": None,
    }
    kinds = [f"{block}.{kind}" for block in range(len(shapes) // 2) for kind in ("key", "value")]
    before = [f"past_key_values.{kind}" for kind in kinds]
    after = [f"present.{kind}" for kind in kinds]
    with tracing(), torch.no_grad():
        program: Any = torch.onnx.export(
            graph,
            kwargs=inputs,
            dynamic_shapes=axes,
            input_names=["input_ids", "attention_mask", "position_ids", *before, KEEP],
            output_names=["logits", *after],
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
        )
    made = program.model
    made.graph.outputs[0].shape[1] = "kept"
    for value in made.graph.outputs[1:]:
        value.shape[2] = "total"
    keep = made.graph.inputs[-1]
    keep.const_value = onnx_ir.tensor(0, dtype=onnx_ir.DataType.INT64, name=KEEP)
    made.graph.register_initializer(keep)
    anonymous(made).metadata_props[WEIGHTS] = str(weights)
    return Exported(made, model.config)


def meant(model: Any) -> int:
    """How many numbers the tensors of `model` mean, whatever they are stored as.

    Codes of a head that is tied to the embedding mean none of their own.
    """
    count = sum(tensor.numel() for tensor in plain_tensors(model).values())
    tied = getattr(model.config, "tie_word_embeddings", False)
    for name, layer in our_layers(model).items():
        if tied and name == head_name(model):
            continue
        spec, bias = layer.spec(), getattr(layer, "bias", None)
        count += spec["in_features"] * spec["out_features"]
        count += 0 if bias is None else bias.numel()
    return count


def past_shapes(model: Any) -> list[tuple[int, int]]:
    """(key heads, width) of every tensor of the past: key and value of each block in turn."""
    from compress.decoder import decoder_for

    decoder = decoder_for(model, own=False)
    if decoder is None:
        raise ValueError(f"no ONNX export of {model.config.model_type} with this config")
    each = [(block.key_heads, decoder.width) for block in decoder.blocks]
    return list(chain.from_iterable((shape, shape) for shape in each))


def anonymous(made: Any) -> Any:
    """`made` without what the exporter notes about the source: files, lines, stack traces."""
    made.metadata_props.clear()
    made.graph.metadata_props.clear()
    for node in made.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*made.graph.inputs, *made.graph.initializers.values()):
        value.metadata_props.clear()
    return made


def weights(folder: Path) -> int | None:
    """How many numbers the graph in `folder` means; None if it is not there or none of ours."""
    if not (folder / NUMBERS).is_file():
        return None
    import onnx  # not in the environments of all peers

    graph = onnx.load(folder / GRAPH, load_external_data=False)
    said = {entry.key: entry.value for entry in graph.metadata_props}.get(WEIGHTS, "")
    return int(said) if said.isdecimal() else None
