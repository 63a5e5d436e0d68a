"""Decoding through blocks of Llama-2-7B's shapes: bytes a token, share of the bandwidth.

    python tests/benchmarks/layer_stack.py --blocks 4 --rounds 7 --methods 'cast,int8_sym,rtn'

At these shapes a token costs the reading of its weights. The machine's bandwidth is measured in the
same process, as summing a gigabyte with the same threads, in turns with the models. Weights are
random. Bytes a token are those of the blocks' codes, scales and zeros; embedding and head are left
out by a vocabulary of 64. Ratios are to `cast`, taken within rounds.
"""

import argparse
import statistics
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import compress
from compress.layers import conv1d_to_linear
from compress.registry import split_outside_brackets

GIGABYTE = torch.ones(2**28)  # float32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--methods", default="cast,int8_sym,rtn,rtn(symmetric=true)")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = {}
    for method in split_outside_brackets(options.methods):
        runner = compress.TorchRunner(compress.apply(method, stack(options.blocks)))
        rows[method] = runner, bytes_read(runner), runner.kernels(1)
    samples: dict[str, list[float]] = {method: [] for method in rows}
    bandwidth = []
    for turn in range(options.rounds + 1):  # the first warms up
        begin = time.perf_counter()
        GIGABYTE.sum()
        bandwidth.append(GIGABYTE.nbytes / (time.perf_counter() - begin))
        for method, (runner, _, _) in rows.items():
            logits, cache = runner.prefill(torch.zeros(1, 1, dtype=torch.int64))
            begin = time.perf_counter()
            for _ in range(options.tokens):
                runner.decode(logits.argmax(-1, keepdim=True), cache)
            if turn:
                samples[method].append((time.perf_counter() - begin) / options.tokens)
    speed = statistics.median(bandwidth)
    print(f"memory: {speed / 1e9:.1f} GB/s read by {options.threads} threads")
    print("| row | ms a token | x | MB a token | share of bandwidth | kernels |")
    print("|---|---|---|---|---|---|")
    base = samples.get("cast", next(iter(samples.values())))
    for method, (_, read, kernels) in rows.items():
        found = samples[method]
        ratio = statistics.median(b / s for b, s in zip(base, found, strict=True))
        share = read / statistics.median(found) / speed
        print(
            f"| {method} | {1000 * statistics.median(found):.1f} | {ratio:.2f} "
            f"| {read / 1e6:.0f} | {share:.0%} | {', '.join(kernels)} |"
        )


def stack(blocks: int) -> torch.nn.Module:
    """The blocks, weights of 1 / sqrt(in)."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=64,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=blocks,
        num_attention_heads=32,
        num_key_value_heads=32,
    )
    torch.manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device="cpu")
    model.model.rotary_emb.__init__(config)  # its buffers have to be computed
    for parameter in model.parameters():
        parameter.data.normal_(0, 4096**-0.5)
    return conv1d_to_linear(model)


def bytes_read(runner: compress.TorchRunner) -> int:
    """Bytes of the blocks' linear layers that one token needs: codes, and the grid as prepared."""
    assert runner.decoder is not None
    total = 0
    for layer in runner.decoder.linears()[:-1]:
        pairs = getattr(layer, "pairs", None)
        grid = layer.int4 or ((layer.scale, layer.zero) if pairs is None else (pairs,))
        parts = {id(each): each for each in (layer.codes, *grid)}
        total += sum(each.nbytes for each in parts.values() if isinstance(each, torch.Tensor))
    return total


if __name__ == "__main__":
    main()
