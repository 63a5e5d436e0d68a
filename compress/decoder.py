"""Llama and GPT-2 run by a forward pass of our own: the same function, a fraction of the calls.

Decoding one token is bound by how many small operations Python starts, more than by arithmetic. So
here: a cache of keys and values that is written in place; q, k and v, and gate and up, multiplied
as one layer (rows of one matrix do not know each other: exact); rotary positions in three
operations for queries and keys at once; query heads that share keys as rows of one product; norms
as one fused operation; single tokens through compiled functions where there is a compiler
(token_step.py). `decoder_for` says which models it takes; the others run in transformers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from compress import token_step
from compress.decoder_parts import GatedUnit, Gelu, RmsNorm, Rotary
from compress.fuse import fused
from compress.kernel_choice import FEW_ROWS

Layer = Callable[[Tensor], Tensor]
ROOM = 128  # tokens that a new cache has room for beyond the prompt
GELU = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}


class Cache:
    """Keys and values of every block: one tensor (2, batch, key heads, room, width) a block.

    heads: key heads of each block. length: tokens read so far. It grows by doubling.
    """

    def __init__(
        self,
        batch: int,
        heads: list[int],
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.batch, self.heads, self.width = batch, heads, width
        self.like = torch.empty(0, dtype=dtype, device=device)
        self.length = self.room = 0
        self.step: Any = None  # see token_step.py
        self.blocks = [self.like] * len(heads)

    def reserve(self, tokens: int) -> None:
        """Make room for so many more tokens."""
        if self.length + tokens <= self.room:
            return
        self.room = max(2 * self.room, self.length + tokens + ROOM)
        for number, (old, heads) in enumerate(zip(self.blocks, self.heads, strict=True)):
            new = self.like.new_empty(2, self.batch, heads, self.room, self.width)
            if self.length:
                new[..., : self.length, :] = old[..., : self.length, :]
            self.blocks[number] = new


@dataclass(frozen=True)
class Block:
    """One decoder block: two norms, and the linear layers as functions.

    qkv: (..., in) -> (..., (heads + 2 key heads) * width). inner: what stands between the MLP's
    first layers and its last, (..., rows of `up`) -> (..., in of `down`).
    """

    heads: int
    key_heads: int
    norm1: Layer
    qkv: Layer
    out: Layer
    norm2: Layer
    up: Layer
    inner: Layer
    down: Layer


@dataclass(frozen=True)
class Decoder:
    """A model as `forward` needs it. rotary: positions -> (cos, sin), or None for GPT-2."""

    blocks: list[Block]
    embed: Callable[[Tensor, int], Tensor]  # (ids, position of the first) -> hidden
    norm: Layer
    head: Layer
    width: int
    scale: float
    rotary: Rotary | None
    dtype: torch.dtype
    device: torch.device

    @cached_property
    def steps_compiled(self) -> bool:
        """Whether single tokens go through token_step.py."""
        return token_step.takes(self)

    @cached_property
    def program(self) -> token_step.Program:
        """The blocks for token_step.py."""
        return token_step.program(self)

    def cache(self, batch: int) -> Cache:
        """An empty cache."""
        heads = [block.key_heads for block in self.blocks]
        return Cache(batch, heads, self.width, self.dtype, self.device)

    def linears(self) -> list[Any]:
        """The layers that multiply matrices, the head last."""
        called = [
            layer for block in self.blocks for layer in (block.qkv, block.out, block.up, block.down)
        ]
        return [getattr(layer, "__self__", layer) for layer in [*called, self.head]]

    def forward(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """(batch, seq) token ids after those in `cache` -> (batch, seq, in), the last norm done."""
        batch, count = ids.shape
        cache = self.cache(batch) if cache is None else cache
        cache.reserve(count)
        start = cache.length
        stop = cache.length = start + count
        x = self.embed(ids, start)
        few = count == 1 and batch < FEW_ROWS
        if few and self.steps_compiled and x.dtype == self.dtype:
            return token_step.step(self, x, cache)
        angles = self.rotary.at(start, stop) if self.rotary else None
        mask = _mask(start, stop, self.device) if start and count > 1 else None
        for block, held in zip(self.blocks, cache.blocks, strict=True):
            qkv = block.qkv(block.norm1(x)).view(batch, count, -1, self.width)
            if angles is not None:
                part = qkv.narrow(2, 0, block.heads + block.key_heads)
                other = torch.roll(part, self.width // 2, -1)
                part.mul_(angles[0]).addcmul_(other, angles[1])
            both = qkv.narrow(2, block.heads, 2 * block.key_heads).unflatten(2, (2, -1))
            held.narrow(3, start, count).copy_(both.permute(2, 0, 3, 1, 4))
            keys, values = held.narrow(3, 0, stop).unbind(0)
            x = x + block.out(self.attend(qkv.narrow(2, 0, block.heads), keys, values, mask))
            x = x + block.down(block.inner(block.up(block.norm2(x))))
        return self.norm(x)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """query (batch, seq, heads, width), keys (batch, key heads, read, width).

        Returns (batch, seq, heads * width).
        """
        batch, count = query.shape[:2]
        if count == 1:  # heads that share keys become rows of one product
            grouped = query.view(batch, keys.shape[1], -1, self.width)
            y = F.scaled_dot_product_attention(grouped, keys, values, scale=self.scale)
            return y.reshape(batch, 1, -1)
        y = F.scaled_dot_product_attention(
            *(query.transpose(1, 2), keys, values, mask),
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=query.shape[2] != keys.shape[1],
        )
        return y.transpose(1, 2).reshape(batch, count, -1)


def _mask(start: int, stop: int, device: torch.device) -> Tensor:
    """Which of `stop` tokens each of those from `start` on may see, (stop - start, stop)."""
    return torch.ones(stop - start, stop, dtype=torch.bool, device=device).tril_(start)


def decoder_for(model: Any, own: bool = True) -> Decoder | None:
    """`model` as a Decoder; None if something in its config is not done here.

    own: layers are ours and may be joined and replaced; else they are called as they are.
    """
    build = {"llama": _llama, "gpt2": _gpt2}.get(model.config.model_type)
    return build(model, own) if build else None


def _llama(model: Any, own: bool) -> Decoder | None:
    config, body = model.config, model.model
    kind = getattr(getattr(body, "rotary_emb", None), "rope_type", None)
    known = ("default", "linear", "llama3", "yarn")  # angles that do not depend on the length
    if config.hidden_act != "silu" or kind not in known:
        return None
    width, dtype = body.layers[0].self_attn.head_dim, body.norm.weight.dtype
    device = body.norm.weight.device
    blocks = []
    for layer in body.layers:
        attention, mlp = layer.self_attn, layer.mlp
        blocks.append(
            Block(
                _heads(attention.q_proj, width, config.num_attention_heads),
                _heads(attention.k_proj, width, config.num_key_value_heads),
                _rms_norm(layer.input_layernorm),
                fused(attention, ("q_proj", "k_proj", "v_proj"), dtype, own),
                fused(attention, ("o_proj",), dtype, own),
                _rms_norm(layer.post_attention_layernorm),
                fused(mlp, ("gate_proj", "up_proj"), dtype, own),
                GatedUnit(),
                fused(mlp, ("down_proj",), dtype, own),
            )
        )
    return Decoder(
        blocks,
        lambda ids, start: body.embed_tokens(ids),
        _rms_norm(body.norm),
        fused(model, ("lm_head",), dtype, own),
        width,
        width**-0.5,
        Rotary(body.rotary_emb, dtype, device),
        dtype,
        device,
    )


def _heads(layer: Any, width: int, said: int, side: str = "out_features") -> int:
    """How many heads of `width` the layer writes or reads; `said` where it does not tell."""
    return getattr(layer, side, said * width) // width


def _gelu(module: Any, approximate: str) -> Layer:
    """The fused function; what another library put in its place stays."""
    if not type(module).__module__.startswith("transformers."):
        return module
    return Gelu(approximate)


def _rms_norm(norm: Any) -> Layer:
    """The fast norm; what another library put in its place stays."""
    if type(norm).__name__ != "LlamaRMSNorm":
        return norm
    return RmsNorm(norm.weight, norm.variance_epsilon)


def _gpt2(model: Any, own: bool) -> Decoder | None:
    config, body = model.config, model.transformer
    plain = config.scale_attn_weights and not config.scale_attn_by_inverse_layer_idx
    if config.activation_function not in GELU or not plain or config.add_cross_attention:
        return None
    width, dtype = config.n_embd // config.n_head, body.ln_f.weight.dtype
    device = body.ln_f.weight.device
    approximate = GELU[config.activation_function]
    blocks = [
        Block(
            _heads(block.attn.c_proj, width, config.n_head, "in_features"),
            _heads(block.attn.c_proj, width, config.n_head, "in_features"),
            block.ln_1,
            fused(block.attn, ("c_attn",), dtype, own),
            fused(block.attn, ("c_proj",), dtype, own),
            block.ln_2,
            fused(block.mlp, ("c_fc",), dtype, own),
            _gelu(block.mlp.act, approximate),
            fused(block.mlp, ("c_proj",), dtype, own),
        )
        for block in body.h
    ]

    def embed(ids: Tensor, start: int) -> Tensor:
        return body.wte(ids) + body.wpe.weight[start : start + ids.shape[1]]

    head = fused(model, ("lm_head",), dtype, own)
    return Decoder(blocks, embed, body.ln_f, head, width, width**-0.5, None, dtype, device)
