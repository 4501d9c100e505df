"""FedRAG's LSR loss and data collators: for those who write their own training loop."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from ragkit_kernels.lsr_loss import DIRECTIONS, lsr_loss
from torch import Tensor, nn

from ragkit.compat.fedrag_generator import as_template
from ragkit.compat.fedrag_names import refuse_unknown
from ragkit.compat.fedrag_system import core_of
from ragkit.prompts import PromptError, PromptTemplate
from ragkit.rag.generator import TokenizerError
from ragkit.tuning.qa_data import DataError

_DIRECTIONS = {"reverse": "KL(Q_LM||P_R)", "paper": "KL(P_R||Q_LM)", **{name: name for name in DIRECTIONS}}
IGNORED = -100  # the label that the cross-entropy of transformers leaves out


class ReductionMode(str, Enum):
    """What becomes of the losses of a batch."""

    MEAN = "mean"
    SUM = "sum"


class LSRLoss(nn.Module):
    """KL divergence between P_R = softmax(retrieval_scores / gamma) and Q_LM = softmax(lm_scores / beta).

    As it is, it gives FedRAG's numbers: KL(Q_LM||P_R) without temperatures. The papers (REPLUG, RA-DIT) have
    KL(P_R||Q_LM) and small temperatures: `LSRLoss(direction="paper", gamma=0.05)`.

    | input            | shape  | meaning                                        |
    |------------------|--------|------------------------------------------------|
    | retrieval_scores | [B, K] | similarity of each passage, with gradient      |
    | lm_scores        | [B, K] | the LM's score of each passage, taken constant |

    Args:
        reduction: "mean" over the B queries, or "sum".
        direction: "reverse" (FedRAG's), "paper", or one of `ragkit.LSRConfig`'s.
        gamma: Temperature of the retriever, > 0.
        beta: Temperature of the LM, > 0.

    Raises:
        ValueError: A reduction or direction that there is not.

    Example:
        >>> loss = LSRLoss()(torch.tensor([[1.0, 2.0]], requires_grad=True), torch.tensor([[0.0, 0.0]]))
        >>> round(float(loss), 4)  # KL of (0.5, 0.5) and (0.2689, 0.7311)
        0.1201
    """

    def __init__(
        self, reduction: str = "mean", direction: str = "reverse", gamma: float = 1.0, beta: float = 1.0
    ) -> None:
        super().__init__()
        self.reduction = _one_of("reduction", reduction, [mode.value for mode in ReductionMode])
        self.direction = _DIRECTIONS[_one_of("direction", direction, list(_DIRECTIONS))]
        self.gamma, self.beta = gamma, beta

    def forward(self, retrieval_scores: Tensor, lm_scores: Tensor) -> Tensor:
        """The loss, a scalar in nats with gradient into `retrieval_scores`."""
        return lsr_loss(retrieval_scores, lm_scores, self.gamma, self.beta, self.direction, reduction=self.reduction)


class DataCollatorForLSR:
    """Queries with responses -> the two tensors of `LSRLoss`.

    `retrieval_scores` are computed afresh, with gradient into the retriever's query encoder. `lm_scores` are
    log-probabilities per token of the response, in nats: as probabilities they would be 0 for long responses.

    Args:
        rag_system: Retrieves `top_k` nodes for each query and scores them, each alone in the prompt.
        prompt_template: Holds `{query}` and `{context}`; None: ragkit's "plain".
        target_template: Ends with `{response}`; what stands before it belongs to the prompt.
        default_return_tensors: "pt".
    """

    def __init__(
        self,
        rag_system: Any,
        prompt_template: str | None = None,
        target_template: str | None = None,
        default_return_tensors: str = "pt",
        **unknown: Any,
    ) -> None:
        known = ["rag_system", "prompt_template", "target_template", "default_return_tensors"]
        refuse_unknown("DataCollatorForLSR", unknown, known)
        self.rag_system, self._core = rag_system, core_of(rag_system)
        before, after = _around_response(target_template or "{response}", "target_template")
        if after.strip():
            raise PromptError(f"target_template: only the response is scored; leave out what follows it ({after!r})")
        self.template = as_template("plain")
        if prompt_template is not None or before:
            self.template = as_template((prompt_template or "{context}\nQuestion: {query}\nAnswer:") + before)
        self.default_return_tensors = _tensors(default_return_tensors)

    def __call__(self, features: Sequence[Mapping[str, Any]], return_tensors: str | None = None) -> dict[str, Tensor]:
        """B rows with "query" and "response" -> retrieval_scores and lm_scores, both [B, K].

        Raises:
            ValueError: `return_tensors` is not "pt".
            DataError: A row lacks one of the two, or no node was found for it.
        """
        _tensors(return_tensors or self.default_return_tensors)
        core, generator = self._core, self._core.generator
        queries, responses = _columns(features)
        found = core.batch_retrieve(queries)
        if not all(found):
            raise DataError("the knowledge store is empty: load_nodes first")
        retriever: Any = core.retriever
        scores = retriever.score(queries, [[passage.id for passage in row] for row in found])  # [B, K]
        prompts, answers = [], []
        for query, response, row in zip(queries, responses, found, strict=True):
            answer = generator.encode_response(response, template=self.template)
            prompts += [generator.encode_prompt(self.template, query, [p], reserve=len(answer)) for p in row]
            answers += [answer] * len(row)
        lengths = torch.tensor([len(answer) for answer in answers])
        lm_scores = (generator.sequence_logprob(prompts, answers) / lengths).reshape(len(queries), -1)  # [B, K]
        return {"retrieval_scores": scores, "lm_scores": lm_scores.to(scores.device)}


class DataCollatorForRALT:
    """Queries with responses -> a batch for a causal LM, one instance for each retrieved node.

    Labels are on the response and the end-of-sequence token only, and padding is on the left.

    Args:
        rag_system: Retrieves `top_k` nodes for each query.
        example_template: Holds `{query}`, `{context}` and, after them, `{response}`; what follows the response is
            learnt with it. None: the generator's prompt template.
        default_return_tensors: "pt".
    """

    def __init__(
        self,
        rag_system: Any,
        example_template: str | None = None,
        default_return_tensors: str = "pt",
        **unknown: Any,
    ) -> None:
        refuse_unknown("DataCollatorForRALT", unknown, ["rag_system", "example_template", "default_return_tensors"])
        self.rag_system, self._core = rag_system, core_of(rag_system)
        self.template: PromptTemplate | None = None
        self.suffix = ""
        if example_template is not None:
            before, self.suffix = _around_response(example_template, "example_template")
            self.template = as_template(before)
        self.default_return_tensors = _tensors(default_return_tensors)

    def __call__(self, features: Sequence[Mapping[str, Any]], return_tensors: str | None = None) -> dict[str, Tensor]:
        """B rows with "query" and "response" -> input_ids, attention_mask and labels, int64 [B * K, T].

        Raises:
            ValueError: `return_tensors` is not "pt".
            DataError: A row lacks one of the two.
            TokenizerError: The tokenizer has no token to pad with.
        """
        _tensors(return_tensors or self.default_return_tensors)
        core, generator = self._core, self._core.generator
        template = self.template or core.template
        queries, responses = _columns(features)
        prompts, answers = [], []
        for query, response, row in zip(queries, responses, core.batch_retrieve(queries), strict=True):
            answer = generator.encode_response(response + self.suffix.rstrip(), template=template)
            prompts += [generator.encode_prompt(template, query, [p], reserve=len(answer)) for p in row]
            answers += [answer] * len(row)
        return left_padded(prompts, answers, padding_id(generator.tokenizer))


def left_padded(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_id: int
) -> dict[str, Tensor]:
    """N prompts and responses as token ids -> input_ids, attention_mask and labels, int64 [N, T], padded on the left
    with `pad_id`, 0 and -100; labels are -100 on the prompt too."""
    width = max((len(p) + len(r) for p, r in zip(prompts, responses, strict=True)), default=0)
    input_ids = torch.full((len(prompts), width), pad_id)  # [N, T]
    attention_mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, IGNORED)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        start = width - len(prompt) - len(response)
        input_ids[row, start:] = torch.tensor([*prompt, *response])
        attention_mask[row, start:] = 1
        labels[row, start + len(prompt) :] = input_ids[row, start + len(prompt) :]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def padding_id(tokenizer: Any) -> int:
    """The token to pad with: the pad token, else the EOS token.

    Raises:
        TokenizerError: There is neither, or its id is negative.
    """
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if found is None:
        raise TokenizerError("the tokenizer has neither a pad nor an EOS token to pad with; set tokenizer.pad_token")
    if found < 0:
        raise TokenizerError(f"the tokenizer's pad token has the id {found}; expected one of its vocabulary")
    return int(found)


def _around_response(template: str, name: str) -> tuple[str, str]:
    if template.count("{response}") != 1:
        raise PromptError(f"{name} must hold {{response}} exactly once, found {template.count('{response}')} times")
    before, after = template.split("{response}")
    if "{" in after.replace("{{", ""):
        raise PromptError(f"{name}: {{response}} comes last, but {after!r} follows it")
    return before, after


def _tensors(kind: str) -> str:
    if kind != "pt":
        raise ValueError(f'return_tensors: found {kind!r}, expected "pt": batches are PyTorch tensors')
    return kind


def _columns(features: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    columns: dict[str, list[str]] = {"query": [], "response": []}
    for number, row in enumerate(features):
        for name, values in columns.items():
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise DataError(f"row {number}: {name!r} is {row.get(name)!r}, expected a text; it has {sorted(row)}")
            values.append(row[name])
    return columns["query"], columns["response"]


def _one_of(name: str, value: Any, known: Sequence[str]) -> str:
    text = str(value.value if isinstance(value, Enum) else value)
    if text not in known:
        near = difflib.get_close_matches(text, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name}: found {value!r}, expected one of {', '.join(known)}{hint}")
    return text
