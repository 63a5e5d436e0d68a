"""A causal language model that returns its loss: what the loop trains and evaluates."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from finetune.training.batches import IGNORED
from finetune.training.projection_loss import projection_loss


class Sums(NamedTuple):
    """Over the targets that are not IGNORED: summed -ln p, right first guesses, their number."""

    nll: Tensor
    correct: Tensor
    scored: Tensor


class LossModel(nn.Module):
    """`model` (transformers' GPT-2 or Llama, LoRA layers in it or not) with a summed loss.

    Positions without a target never meet the vocabulary projection, which for a 135M-parameter
    Llama is a quarter of the work: prompts and padding cost less.
    """

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        # GPT-2's and Llama's are body, then head; an own definition may do more.
        self.has_own_forward = not type(model).forward.__module__.startswith("transformers.")

    def forward(self, ids: Tensor, targets: Tensor) -> Sums:
        """ids, targets: (rows, tokens) int64, see Batch."""
        targets = targets.flatten()
        kept = targets != IGNORED
        if self.has_own_forward:
            logits = self.model(input_ids=ids, use_cache=False).logits.flatten(0, 1)[kept]
            targets = targets[kept]
            nll = nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
            correct = (logits.argmax(-1) == targets).sum()
        else:
            body = getattr(self.model, self.model.base_model_prefix)
            hidden = body(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
            if not bool(kept.all()):
                hidden, targets = hidden[kept], targets[kept]
            nll, correct = projection_loss(hidden, self.model.get_output_embeddings(), targets)
        return Sums(nll, correct, torch.tensor(len(targets), device=ids.device))
