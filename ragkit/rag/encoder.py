"""One sentence-transformers model as the retriever uses it: with and without gradient, the same numbers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ragkit.rag.loading import (
    can_keep_name,
    digests,
    digests_if_named,
    evaluating,
    quiet,
    resolve_device,
    resolve_encoder,
)

# The names under which models on the hub keep the prompts of each side, as in sentence-transformers' encode_query and
# encode_document.
OWN_PROMPTS = {"query": ("query",), "passage": ("document", "passage", "corpus")}
Side = Literal["query", "passage"]
# MiniLM accepts 256 tokens but was trained on texts of 128; on hotpot_mini and wiki2_mini 160 finds more than 256.
DEFAULT_MAX_TOKENS = 160


class Encoder:
    """A text encoder.

    Args:
        model: Name, folder, `SentenceTransformer`, or another `Encoder` (taken as it is).
        device: Where the model goes; with `"auto"` or None a live model stays where it is.
        max_tokens: Longer texts are cut; None keeps the model's own limit, and means 160 for `"default"`.
        trust_remote_code: Runs code that a model on the hub brings.

    Raises:
        ValueError: The model cannot be loaded (the message says from where), or `max_tokens` is more than it has
            positions for.
    """

    def __init__(
        self,
        model: Any = "default",
        device: str | torch.device | None = None,
        max_tokens: int | None = None,
        trust_remote_code: bool = False,
    ):
        from sentence_transformers import SentenceTransformer  # takes seconds to import

        self.source: str | None = None
        self._loaded: Counter[str] | None = None
        self.model: SentenceTransformer
        if isinstance(model, Encoder):
            self.source, self._loaded, model = model.source, model._loaded, model.model
        elif isinstance(model, (str, Path)):
            self.source = str(model)
            try:
                with quiet():
                    model = SentenceTransformer(
                        resolve_encoder(self.source),
                        device=str(resolve_device(device)),
                        trust_remote_code=trust_remote_code,
                    )
            except (OSError, ValueError) as error:
                raise ValueError(f"no text encoder could be loaded from {self.source!r}: {error}") from error
            self._loaded = digests_if_named(self.source, model)
        elif not isinstance(model, SentenceTransformer):
            raise TypeError(f"expected a name, a folder or a SentenceTransformer, found {type(model).__name__}")
        self.model = model if device in (None, "auto") else model.to(device)
        if max_tokens is None and self.source == "default":
            max_tokens = DEFAULT_MAX_TOKENS
        if max_tokens is not None:
            limit = self.max_positions
            if limit is not None and max_tokens > limit:
                raise ValueError(
                    f"max_tokens (in the settings rag.max_passage_tokens) is {max_tokens}, but the encoder "
                    f"{self.name!r} has positions for {limit} tokens at most"
                )
            self.model.max_seq_length = max_tokens

    @property
    def name(self) -> str:
        """What it was loaded from, for messages."""
        return self.source or "live model"

    @property
    def dim(self) -> int | None:
        """Size of an embedding; None if the model does not say."""
        get = getattr(self.model, "get_embedding_dimension", None) or self.model.get_sentence_embedding_dimension
        return get()

    @property
    def max_positions(self) -> int | None:
        """Most tokens of a text that the model has positions for; None if it does not say."""
        for module in self.model.modules():
            limit = getattr(getattr(module, "config", None), "max_position_embeddings", None)
            if isinstance(limit, int) and limit > 0:
                tables = (part for name, part in module.named_modules() if name.endswith("position_embeddings"))
                padding = next((p for table in tables if (p := getattr(table, "padding_idx", None)) is not None), None)
                return limit if padding is None else limit - padding - 1  # RoBERTa and MPNet count from there on
        return None

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return torch.device(self.model.device)

    def encode(self, texts: Sequence[str], side: Side, prompt: str = "", batch_size: int = 64) -> Tensor:
        """Embeddings float32 [N, D] of length 1, without gradient or dropout; `texts` are batched by length."""
        if not texts:
            return torch.empty(0, self.dim or 0, device=self.device)
        order = sorted(
            range(len(texts)), key=lambda i: -len(texts[i])
        )  # longest first: an out-of-memory comes at once
        parts = []
        with torch.no_grad(), evaluating(self.model):
            for start in range(0, len(order), batch_size):
                batch = [texts[i] for i in order[start : start + batch_size]]
                parts.append(self.encode_with_grad(batch, side, prompt))
        back = torch.empty(len(order), dtype=torch.long)
        back[order] = torch.arange(len(order))
        return torch.cat(parts)[back.to(parts[0].device)]

    def encode_with_grad(self, texts: Sequence[str], side: Side, prompt: str = "") -> Tensor:
        """Embeddings float32 [N, D] of length 1 in one forward pass; gradient and dropout as the caller has set them.

        Args:
            texts: N texts.
            side: Chooses the model's own prompt where `prompt` is empty.
            prompt: Put before each text.
        """
        prompt = prompt or self._own_prompt(side)
        features = self._features(list(texts), prompt)
        features = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in features.items()}
        embeddings = self.model(features)["sentence_embedding"]  # [N, D]
        if self.model.truncate_dim is not None:  # Matryoshka models
            embeddings = embeddings[:, : self.model.truncate_dim]
        return torch.nn.functional.normalize(embeddings.float(), dim=1)

    def _features(self, texts: list[str], prompt: str) -> dict[str, Any]:
        if hasattr(self.model, "preprocess"):  # sentence-transformers >= 5.3
            return self.model.preprocess(texts, prompt=prompt or None)
        features: dict[str, Any] = self.model.tokenize([prompt + text for text in texts])
        if prompt and any(getattr(part, "include_prompt", True) is False for part in self.model):
            # INSTRUCTOR and GRIT pool over the text alone and must know where it starts: after the prompt's tokens,
            # of which the last is the tokenizer's end token.
            features["prompt_length"] = self.model.tokenize([prompt])["input_ids"].shape[-1] - 1
        return features

    def _own_prompt(self, side: Side) -> str:
        prompts = self.model.prompts or {}
        names = [*OWN_PROMPTS[side], self.model.default_prompt_name]
        return next((prompt for name in names if name is not None and (prompt := prompts.get(name))), "")

    def save(self, directory: Path) -> dict[str, Any]:
        """Writes the weights, unless the model's name says them; returns what `load` needs to know."""
        if can_keep_name(self._loaded, self.model):
            return {"name": self.source, "digests": sorted(digests(self.model).elements())}
        with quiet():
            self.model.save(str(directory), create_model_card=False)
        return {"name": None, "digests": None}

    @classmethod
    def load(cls, directory: Path, saved: dict[str, Any], **arguments: Any) -> Encoder:
        """Reads what `save` wrote.

        Raises:
            ValueError: The weights are missing or corrupt, or a model taken by name is not the one that was saved.
        """
        try:
            name = saved["name"]
        except (TypeError, KeyError) as error:
            raise ValueError(f"{directory.parent}: no encoder is named in it ({json.dumps(saved)})") from error
        if name is None and not directory.is_dir():
            raise ValueError(f"{directory}: missing; the folder was cut off while it was written or copied")
        encoder = cls(str(directory) if name is None else name, **arguments)
        if name is not None and sorted(digests(encoder.model).elements()) != saved["digests"]:
            raise ValueError(
                f"the encoder {name!r} is not the one that was saved: its weights have changed since; "
                "encode the passages again with the one that is there now"
            )
        return encoder
