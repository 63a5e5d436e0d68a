"""`torch_pruning:magnitude`: Torch-Pruning's own recipe for language models, without calibration.

Counterpart of `prune_structured`: MLP channels and the width of the hidden states, the same share
everywhere, by the 2-norm of all that goes with a channel. Its recipe takes heads too; where heads
share keys its grouping of q, k and v does not come to an end, so that there they all stay.

Source: https://github.com/VainF/Torch-Pruning (examples/LLMs)
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from baselines.peer import Peer, read_transformers
from compress.base import Progress, Runner, TorchRunner, silent
from compress.registry import register


@dataclass(frozen=True)
class TorchPruning(Peer):
    """ratio: the share of each width that goes, of matrices on both sides.

    round_to: widths are left a multiple of this; 0 for one of the recipe's 4 and of the number of
    heads, since transformers refuses hidden states that the heads do not divide.
    """

    env: ClassVar[str | None] = "torch_pruning"
    libraries: ClassVar[tuple[str, ...]] = ("torch-pruning",)
    leaves: ClassVar[str] = "floats"

    ratio: float = 0.1
    round_to: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for a ratio that leaves all or nothing."""
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio must be above 0 and below 1, not {self.ratio}")

    def read(self, folder: Path) -> Any:
        """The model in float32."""
        import torch_pruning  # noqa: F401 - slow to import: not part of the cost

        return read_transformers(folder, dtype=torch.float32)

    def compress(
        self, model: Any, calibration: Tensor | None = None, progress: Progress = silent
    ) -> Any:
        """Prune in place. Raises ValueError for another architecture than Llama's."""
        import torch_pruning

        config = model.config
        if config.model_type != "llama":
            raise ValueError("torch_pruning: its recipe reads q_proj, k_proj and v_proj")
        config.use_cache = False  # or tracing does not come to an end
        width = model.model.layers[0].self_attn.head_dim
        heads, keys = config.num_attention_heads, config.num_key_value_heads
        shared = heads != keys
        counts: dict[Any, int] = {}
        for block in model.model.layers:
            attention = block.self_attn
            counts |= {attention.q_proj: heads, attention.k_proj: keys, attention.v_proj: keys}
        pruner = torch_pruning.pruner.BasePruner(
            model,
            example_inputs=torch.arange(8)[None],
            importance=torch_pruning.importance.GroupMagnitudeImportance(
                p=2, group_reduction="mean"
            ),
            global_pruning=False,
            pruning_ratio=self.ratio,
            ignored_layers=[model.lm_head, *(counts if shared else ())],
            num_heads=counts,
            prune_num_heads=not shared,
            prune_head_dims=False,
            head_pruning_ratio=self.ratio,
            round_to=self.round_to or math.lcm(4, heads),
            unwrapped_parameters=[(each, 0) for each in model.parameters() if each.dim() == 1],
            output_transform=lambda out: out.logits,
        )
        for group in pruner.step(interactive=True):
            group.prune()
        first = model.model.layers[0]
        config.hidden_size = model.model.embed_tokens.weight.shape[1]
        config.intermediate_size = first.mlp.gate_proj.out_features
        config.num_attention_heads = first.self_attn.q_proj.out_features // width
        config.num_key_value_heads = first.self_attn.k_proj.out_features // width
        config.head_dim = width
        config.use_cache = True
        model.tie_weights()
        return model

    def runner(self, model: Any) -> Runner:
        """A plain model: in our decoder, as our pruned models are."""
        return TorchRunner(model)


register("torch_pruning:magnitude", TorchPruning())
