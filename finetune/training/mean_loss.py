"""The loss over held-out batches, whatever the number of processes."""

import math
from typing import Any

from finetune.training import parallel
from finetune.training.batches import Batch
from finetune.training.parallel import Place


def mean_loss(runner: Any, batches: list[Batch], place: Place) -> dict[str, float]:
    """loss (nats a target), perplexity and token_accuracy (first guesses) over all batches.

    Each process takes its share. Every batch goes through every strategy the same number of times,
    since fsdp needs all processes in each forward pass: missing turns repeat the last batch.
    """
    nll = correct = count = 0.0
    turns = math.ceil(len(batches) / place.world)
    for turn in range(turns):
        index = turn * place.world + place.rank
        batch = batches[min(index, len(batches) - 1)]
        sums = runner(batch.ids.to(place.device), batch.targets.to(place.device))
        if index < len(batches):
            nll += float(sums.nll)
            correct += float(sums.correct)
            count += float(sums.scored)
    nll, correct, count = parallel.summed([nll, correct, count], place)
    loss = nll / count
    perplexity = math.exp(min(loss, 700))
    return {"loss": loss, "perplexity": perplexity, "token_accuracy": correct / count}
