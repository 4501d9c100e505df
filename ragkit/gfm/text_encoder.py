"""The text encoder's side of the model: what it must offer, what tells two apart, and relation embeddings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from ragkit.gfm.tensor_cache import cached, key_of
from ragkit.gfm_config import TextEmbModel
from ragkit.graph import KnowledgeGraph

PROBES = ["a", "Which river flows through the capital of France?", "inverse_capital of " * 400]


class TextEncoder(Protocol):
    """What `ragkit.rag.encoder.Encoder` offers of it."""

    def encode(self, texts: Sequence[str], side: Literal["query", "passage"]) -> Tensor:
        """Embeddings [len(texts), F]."""
        ...


class InstructedEncoder:
    """An encoder with its own text before every question and relation, and what a checkpoint says of it.

    Attributes:
        encoder: An `Encoder`.
        instructs: (before a question, before a relation).
        facts: Its settings under GFM-RAG v1's names.
    """

    def __init__(self, encoder: Any, query: str = "", passage: str = "", batch_size: int = 64) -> None:
        self.encoder, self.instructs, self.batch_size = encoder, (query, passage), batch_size
        name = getattr(encoder, "source", None) or getattr(encoder, "name", type(encoder).__name__)
        self.facts: dict[str, Any] = {"text_emb_model_name": str(name), "normalize": True}
        self.facts.update(query_instruct=query, passage_instruct=passage)

    @property
    def model(self) -> Any:
        """The sentence-transformers model."""
        return self.encoder.model

    def encode(self, texts: Sequence[str], side: Literal["query", "passage"]) -> Tensor:
        """Embeddings [len(texts), F]."""
        return self.encoder.encode(texts, side, self.instructs[side == "passage"], self.batch_size)


def open_encoder(config: TextEmbModel, device: str = "auto") -> InstructedEncoder:
    """The text encoder that the settings name.

    Raises:
        ValueError: It cannot be loaded.
    """
    from ragkit.rag.encoder import Encoder  # imports transformers

    encoder = Encoder(config.text_emb_model_name, device, config.max_tokens)
    return InstructedEncoder(encoder, config.query_instruct, config.passage_instruct, config.batch_size)


def encoder_identity(encoder: TextEncoder) -> str:
    """A hash that differs where two encoders give different embeddings.

    It is made of the weights, prompts and length limit of the encoder's `.model`; for an encoder without one, of what
    it makes of three texts, to four decimals.
    """
    inner = encoder.encoder if isinstance(encoder, InstructedEncoder) else encoder  # without instructs it is the same
    state = hashlib.blake2b(type(inner).__name__.encode(), digest_size=16)
    module = getattr(encoder, "model", encoder)
    if isinstance(module, nn.Module):
        from ragkit.rag.loading import digests  # imports transformers

        names = ("max_seq_length", "truncate_dim", "default_prompt_name", "prompts")
        facts: list[Any] = [str(getattr(module, name, None)) for name in names]
        instructs = getattr(encoder, "instructs", ("", ""))
        facts += list(instructs) if any(instructs) else []
        state.update(json.dumps([*sorted(digests(module).elements()), *facts]).encode())
    else:
        for side in ("query", "passage"):
            probe = encode(encoder, PROBES, side)  # type: ignore[arg-type]
            state.update(repr(tuple(probe.shape)).encode() + (probe * 1e4).round().long().numpy().tobytes())
    return state.hexdigest()


def encode(encoder: TextEncoder, texts: Sequence[str], side: Literal["query", "passage"]) -> Tensor:
    """Embeddings as the model takes them: [M, F] float32 on the CPU, checked.

    Raises:
        ValueError: Another number of rows, or NaN or infinity.
    """
    with torch.inference_mode(False):  # tensors made in inference mode do not tell whether they were changed
        given = torch.as_tensor(encoder.encode(texts, side))
        found = given.detach().to("cpu", torch.float32, copy=True)
    if found.ndim != 2 or len(found) != len(texts):
        raise ValueError(f"the encoder gives {list(found.shape)} for {len(texts)} texts, expected [{len(texts)}, F]")
    bad = ~torch.isfinite(found).all(1)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(f"the encoder gives NaN or infinity for {int(bad.sum())} texts (first: {texts[row][:80]!r})")
    return found


def embed_relations(graph: KnowledgeGraph, encoder: TextEncoder, cache: bool | str | Path = True) -> Tensor:
    """Sets `graph.rel_emb` to the embeddings of `graph.relation_texts`.

    As in GFM-RAG v1 they are encoded as passages, and an inverse relation as the text "inverse_<relation>".

    Args:
        graph: The graph.
        encoder: As for the questions.
        cache: True: kept in the user's cache folder; a folder; False: not kept. The key is the texts and the encoder.

    Returns:
        [2R, F] float32.
    """
    texts = graph.relation_texts
    key = key_of("relations", json.dumps(texts), "" if cache is False else encoder_identity(encoder))
    tensors, _ = cached(cache, "relations", key, lambda: ({"rel_emb": encode(encoder, texts, "passage")}, {}))
    graph.rel_emb = tensors["rel_emb"]
    return tensors["rel_emb"]
