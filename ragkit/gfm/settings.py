"""What shapes a graph foundation model: the names and defaults are GFM-RAG v1's."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from ragkit_kernels.relational_conv import AGGREGATES, MESSAGES

ACTIVATIONS = ("relu",)


@dataclass(frozen=True)
class GFMSettings:
    """Sizes and kinds of the layers.

    Attributes:
        rel_emb_dim: F, numbers in a text embedding of a relation or a question.
        input_dim: D, numbers in a node state.
        hidden_dims: Numbers that each layer puts out; all D, but the last may differ: the boundary condition [N, B, D]
            is added in every layer.
        message_func: What an edge carries, "distmult" (relation ⊙ state) or "transe" (relation + state).
        aggregate_func: How a node joins what its edges carry: "sum", "mean", "max" or "pna".
        short_cut: Adds a layer's input to its output where their sizes are equal.
        layer_norm: LayerNorm before the activation.
        concat_hidden: The head reads the states of all layers, not only of the last.
        num_mlp_layer: Linear maps in the head.
        activation: "relu".

    Raises:
        ValueError: A kind that there is not, or sizes that do not fit; the message says what there is.
    """

    rel_emb_dim: int = 768
    input_dim: int = 512
    hidden_dims: Sequence[int] = (512,) * 6
    message_func: str = "distmult"
    aggregate_func: str = "sum"
    short_cut: bool = True
    layer_norm: bool = True
    concat_hidden: bool = False
    num_mlp_layer: int = 2
    activation: str = "relu"

    def __post_init__(self) -> None:
        if not isinstance(self.hidden_dims, Sequence) or isinstance(self.hidden_dims, str):
            raise ValueError(f"hidden_dims: expected a list with one size for each layer, found {self.hidden_dims!r}")
        object.__setattr__(self, "hidden_dims", tuple(self.hidden_dims))
        for name, known in (("message_func", MESSAGES), ("aggregate_func", AGGREGATES), ("activation", ACTIVATIONS)):
            value = getattr(self, name)
            if value not in known:
                near = difflib.get_close_matches(str(value), known, n=1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise ValueError(f"{name}: {value!r} is not supported; there is {', '.join(known)}{hint}")
        for name in ("rel_emb_dim", "input_dim", "num_mlp_layer"):
            _positive(name, getattr(self, name))
        if not self.hidden_dims:
            raise ValueError("hidden_dims is empty; give one size for each layer")
        for dim in self.hidden_dims:
            _positive("hidden_dims", dim)
        if any(dim != self.input_dim for dim in self.hidden_dims[:-1]):
            raise ValueError(
                f"hidden_dims {list(self.hidden_dims)}: all but the last must equal input_dim = {self.input_dim}, "
                "since the boundary condition of that size is added in every layer"
            )

    @property
    def num_layers(self) -> int:
        """Layers of message passing."""
        return len(self.hidden_dims)

    @property
    def state_dim(self) -> int:
        """Numbers of a node that the head reads."""
        return sum(self.hidden_dims) if self.concat_hidden else self.hidden_dims[-1]


def _positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected a whole number from 1, found {value!r}")
