"""The vocabulary matrix as codes: token embedding, and head where the two are tied."""

from typing import Any, Self

from torch import Tensor, nn

from compress.quant_linear import QuantLinear


class QuantEmbedding(nn.Module):
    """Rows of a QuantLinear by number: a token's embedding is scale * (code - zero) of its row.

    table: the matrix, (vocabulary, width). Where head and embedding are tied, the model's head is
    this very `table`, so that the codes are stored and held once.
    """

    kind = "embedding"

    def __init__(self, table: QuantLinear):
        super().__init__()
        self.table = table

    def forward(self, ids: Tensor) -> Tensor:
        """(...) int64 -> (..., width) in the type of the scales."""
        return self.table.rows(ids.flatten()).view(*ids.shape, -1)

    @property
    def weight(self) -> Tensor:
        """The rebuilt matrix (vocabulary, width), as large as the parent's."""
        return self.table.weight()

    def spec(self) -> dict[str, Any]:
        """See QuantLinear."""
        return self.table.spec() | {"kind": self.kind}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> Self:
        """See QuantLinear."""
        return cls(QuantLinear.from_spec(spec))
