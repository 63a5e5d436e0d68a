"""Training in low precision, simulated: number formats, scales, layers that round.

from finetune import low_precision

low_precision.fake_quantize_linears(model, weights="int8_sym", activations="int8_asym")
low_precision.remove(model)
"""

from finetune.low_precision.fake_quant import fake_quantize_linears, remove
from finetune.low_precision.scaling import Quantizer

__all__ = ["Quantizer", "fake_quantize_linears", "remove"]
