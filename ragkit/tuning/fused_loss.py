"""The training loss of a causal LM without its logits: only the positions that predict a label meet the head."""

from __future__ import annotations

import dataclasses
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from ragkit.config import ConfigError
from ragkit.rag.lm_head import TOLERANCE, LMHead, core_of, hidden_states, read_head
from ragkit.rag.loading import evaluating

IGNORED = -100  # the label that the cross-entropy of transformers leaves out
# Arguments of a model's forward that are about its loss or its logits, not about its hidden states.
_OF_THE_LOSS = ("labels", "num_items_in_batch", "loss_weights", "logits_to_keep", "return_dict", "use_cache")


@contextmanager
def training_loss(model: Any, fused: bool = True, weighted: bool = False) -> Iterator[bool]:
    r"""Within the block, a call of the model with labels gives its loss and no logits.

        loss = −Σ_t w_t · log p(y_t | y_<t) / n      over the labels that are not -100

    with n = num_items_in_batch where it is given (as the Trainer does for accumulated batches of unequal length), else
    the number of labels: the model's own loss, where all weights are 1. The model's own way makes a [B, T, V] tensor
    of logits, another of their float32 copy and one of their gradient; here the rows of the labels alone are
    multiplied with the head, block by block, and again in the backward pass (`ragkit_kernels.linear_logprob`).

    What is replaced is the `forward` of the transformers model itself, so that everything around it (PEFT, DDP, mixed
    precision, the Trainer, checkpoints) goes on as before. Without labels nothing is changed.

    Args:
        model: A causal LM, or a `PeftModel` of one; not yet wrapped by a trainer.
        fused: False: the model's own logits, for comparison.
        weighted: The calls bring `loss_weights` [B, T], float, beside the labels.

    Yields:
        Whether the loss is fused. If not, a warning has said why: the head cannot be read, or the model's own loss is
        more than the formula above. Then, and without weights, the model's own loss is used.

    Raises:
        ConfigError: Weights for a model whose own loss is more than the formula above.
    """
    core = core_of(model)
    head = read_head(model) if fused else None
    more = _more_than_the_labels(core) if head is not None or weighted else ""
    if more and weighted:
        raise ConfigError(f'passage_weights: {more}, which has no weights; set it to "none"')
    if more:
        warnings.warn(f"{more}; it is used as it is, which takes more memory and time", stacklevel=3)
        head = None
    if head is None and not weighted:
        yield False
        return
    own, before = core.forward, core.__dict__.get("forward")

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        labels = kwargs.get("labels")
        if labels is None:
            return own(*args, **kwargs)
        if args:
            raise TypeError("within training_loss, call the model with names: model(input_ids=..., labels=...)")
        given = {name: value for name, value in kwargs.items() if name not in _OF_THE_LOSS and value is not None}
        rows = _Rows.of(labels, kwargs.get("loss_weights"))
        if head is not None:
            hidden = hidden_states(self, **given)  # [B, T, D]
            layer = self.get_output_embeddings()
            now = dataclasses.replace(head, weight=layer.weight, bias=layer.bias)
            logprobs = rows.logprobs(hidden, now)  # [N]
        else:
            logits = own(**given, use_cache=False).logits  # [B, T, V]
            chosen = logits.flatten(0, 1)[rows.positions].float().log_softmax(-1)  # [N, V]
            logprobs = chosen.gather(1, rows.targets.unsqueeze(1)).squeeze(1)
        return CausalLMOutputWithPast(loss=rows.loss(logprobs, kwargs.get("num_items_in_batch")))

    core.forward = types.MethodType(forward, core)
    try:
        yield head is not None
    finally:
        if before is None:
            core.__dict__.pop("forward", None)
        else:
            core.forward = before


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The N labels of a batch: what predicts them, and what they weigh."""

    positions: Tensor  # [N] places in the flattened [B · T], one to the left of the label's own
    targets: Tensor  # [N]
    weights: Tensor | None  # [N]

    @classmethod
    def of(cls, labels: Tensor, weights: Tensor | None) -> _Rows:
        row, column = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)  # [N] each; the first token is never predicted
        positions = row * labels.shape[1] + column
        return cls(positions, labels[row, column + 1], None if weights is None else weights[row, column + 1])

    def logprobs(self, hidden: Tensor, head: LMHead) -> Tensor:
        return head.token_logprobs(hidden.flatten(0, 1), self.targets, self.positions)

    def loss(self, logprobs: Tensor, count: Tensor | int | None) -> Tensor:
        total = -(logprobs if self.weights is None else logprobs * self.weights.to(logprobs)).sum()
        if count is None:
            return total / self.targets.numel() if self.targets.numel() else total * torch.nan  # as the model's own
        return total / (count.to(total.device) if isinstance(count, Tensor) else count)


@torch.no_grad()
def _more_than_the_labels(core: Any) -> str:
    """How a model's own loss differs from the cross-entropy of its own logits, tried out on one text; "" if not.

    Mixtures of experts may add one for their router (`output_router_logits`), and some models predict further tokens.
    """
    ids = (torch.arange(8, device=core.device) % core.get_input_embeddings().weight.shape[0]).unsqueeze(0)  # [1, T]
    with evaluating(core):
        out = core(input_ids=ids, labels=ids, use_cache=False)
    if out.logits is None or out.loss is None:
        return f"{type(core).__name__} makes its loss in a way of its own, without showing logits"
    wanted = torch.nn.functional.cross_entropy(out.logits[0, :-1].float(), ids[0, 1:].to(out.logits.device)).item()
    found = out.loss.item()
    tolerance = max(1e-5, torch.finfo(out.loss.dtype).eps)  # some make the loss in the model's own number format
    if abs(found - wanted) > tolerance * max(1.0, abs(wanted)):  # not so for NaN, which the training itself reports
        return (
            f"{type(core).__name__}'s own loss is more than the cross-entropy of its labels "
            f"({found:.6g}, not {wanted:.6g}, on one text)"
        )
    return ""


@torch.no_grad()
def packing_works(model: Any) -> bool:
    """Whether instances that stand in one row, told apart by positions that start again, do not see each other.

    transformers makes such a mask of `position_ids` where there is no attention mask; not every architecture asks it
    to. Tried out on two short texts in two rows.
    """
    core = core_of(model)
    size = core.get_input_embeddings().weight.shape[0]
    parts = [torch.arange(n, device=core.device) for n in (5, 7, 7, 5)]
    # Two rows, put together in different places: flash attention knows a packed row only where it stands alone.
    places, ids = torch.cat(parts).view(2, 12), torch.cat([part % size for part in parts]).view(2, 12)
    try:
        with evaluating(core):
            together = core(input_ids=ids, position_ids=places, use_cache=False).logits.flatten(0, 1)  # [24, V]
            alone = [core(input_ids=(part % size).unsqueeze(0), use_cache=False).logits[0] for part in parts]
    except TypeError:  # it takes no position_ids
        return False
    wanted = torch.cat(alone).float()
    difference = (together.float() - wanted).abs().max()
    return bool(difference <= TOLERANCE.get(together.dtype, 1e-3) * wanted.abs().max())
