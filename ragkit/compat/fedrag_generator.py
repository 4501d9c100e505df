"""FedRAG's generators on ragkit's `Generator`."""

from __future__ import annotations

import dataclasses
import string
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ragkit.compat.fedrag_names import refuse_unknown
from ragkit.prompts import TEMPLATES, PromptError, PromptTemplate
from ragkit.rag.generator import Generator
from ragkit.rag.loading import quiet, resolve_device, resolve_generator

DEFAULT_NEW_TOKENS = 32  # as in ragkit's RAGConfig
FIELDS = {"query": "{question}", "question": "{question}", "context": "{passages}"}
# Settings of a GenerationConfig that change what `generate` returns, or that are ragkit's to set.
REFUSED = {
    "max_length": "it counts the prompt too; give max_new_tokens",
    "num_return_sequences": "a query has one answer",
    **dict.fromkeys(
        ("return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states"),
        "answers come as text",
    ),
}


class SamplingGenerator(Generator):
    """A `Generator` that decodes as a `GenerationConfig` says; a saved and loaded one is greedy again.

    Args:
        generation_config: None: greedy.
        **arguments: Of `Generator`.
    """

    def __init__(self, generation_config: GenerationConfig | None = None, **arguments: Any) -> None:
        self.decoding = {} if generation_config is None else generation_config.to_diff_dict()
        for name in ("transformers_version", "pad_token_id", "_from_model_config"):
            self.decoding.pop(name, None)
        for name, reason in REFUSED.items():
            if self.decoding.get(name) not in (None, False, 1 if name == "num_return_sequences" else None):
                raise ValueError(f"generation_config.{name}: found {self.decoding[name]!r}; {reason}")
        wanted = self.decoding.pop("max_new_tokens", None) or DEFAULT_NEW_TOKENS
        super().__init__(max_new_tokens=wanted, **arguments)
        half = None if self.max_length is None else self.max_length // 2
        if half is not None and wanted > half:
            warnings.warn(
                f"generation_config.max_new_tokens is {wanted}, but the model has positions for {self.max_length} "
                f"tokens in all: answers end at {half}, so that the prompt has room",
                stacklevel=4,
            )
            self.max_new_tokens = half

    def _decoding(self, limit: int) -> GenerationConfig:
        config, given = super()._decoding(limit), dict(self.decoding)
        ends = given.pop("eos_token_id", None)
        if ends is not None:
            own = config.eos_token_id or []
            config.eos_token_id = sorted({*own, *(ends if isinstance(ends, list) else [ends])})
        if self.device.type != "cuda" and str(given.get("cache_implementation", "")).startswith("offloaded"):
            del given["cache_implementation"]  # keeps the cache off the GPU: without one there is nothing to do
        config.update(**given)
        return config

    def complete(self, prompts: Sequence[str]) -> list[str]:
        """Continuations of prompts that are taken as they are."""
        return self.generate_ids([self._prompt_ids(prompt) for prompt in prompts])

    def target_logprob(self, prompt: str, target: str) -> float:
        """log P(target | prompt) in nats; both are tokenised alone and joined as ids."""
        ids = list(self.tokenizer(target, add_special_tokens=False)["input_ids"])
        return float(self.sequence_logprob([self._prompt_ids(prompt)], [ids])[0])


def as_template(text: str | None, separator: str = "\n") -> PromptTemplate:
    """A FedRAG prompt template, with `{query}` and `{context}` (and `{{` for a brace), as one of ragkit's.

    Args:
        text: The template, the name of one of ragkit's, or None for ragkit's "sources".
        separator: Stands between two contexts.

    Raises:
        PromptError: A placeholder is missing, unknown or there twice.
    """
    if text is None or text in TEMPLATES:
        return dataclasses.replace(TEMPLATES[text or "sources"], separator=separator)
    parts = []
    try:
        for literal, name, _, _ in string.Formatter().parse(text):
            parts.append(literal)
            if name is not None:
                parts.append(FIELDS[name])
    except (KeyError, ValueError) as error:
        raise PromptError(
            f"prompt_template: {error} cannot be filled in; it holds {{query}} and {{context}}, and braces that are "
            "to stay are doubled"
        ) from error
    made = "".join(parts)
    prefix = "" if made[-1:].isspace() else " "  # what the answer starts with, unless there is white space already
    return PromptTemplate("custom", made, passage="{text}", separator=separator, response_prefix=prefix)


class HFPretrainedModelGenerator:
    """A causal language model.

    Args:
        model_name: Name on the hub, a folder, "default", or a live `PreTrainedModel` (with its `tokenizer`).
        generation_config: How answers are decoded; None: greedily, at most 32 tokens.
        prompt_template: Holds `{query}` and `{context}`; None: ragkit's "sources". The same one for training (RALT)
            and for inference.
        load_model_kwargs: Arguments of `AutoModelForCausalLM.from_pretrained`. Without `device_map` the model goes to
            the GPU if there is one.
        load_model_at_init: False: the model is loaded when it is first needed.
        tokenizer: Tokenizer of a live model, or another one than that of `model_name`.

    Raises:
        ValueError: The model cannot be loaded, or `generation_config` holds what cannot be done.
        PromptError: The template cannot be used.
    """

    def __init__(
        self,
        model_name: Any,
        generation_config: GenerationConfig | None = None,
        prompt_template: str | None = None,
        load_model_kwargs: dict[str, Any] | None = None,
        load_model_at_init: bool = True,
        tokenizer: Any = None,
        **unknown: Any,
    ) -> None:
        known = ["model_name", "generation_config", "prompt_template", "load_model_kwargs", "load_model_at_init"]
        in_kwargs = dict.fromkeys(
            ("device_map", "torch_dtype", "dtype", "trust_remote_code", "quantization_config"),
            "it goes into load_model_kwargs={...}",
        )
        places = {"max_new_tokens": "it goes into generation_config=GenerationConfig(max_new_tokens=...)", **in_kwargs}
        refuse_unknown(type(self).__name__, unknown, [*known, "tokenizer"], places)
        self.model_name = model_name
        self.generation_config = generation_config
        self.load_model_kwargs = dict(load_model_kwargs or {})
        self.prompt_template = prompt_template
        self._tokenizer = getattr(tokenizer, "unwrapped", tokenizer)
        self._core: SamplingGenerator | None = None
        if load_model_at_init:
            self.core  # noqa: B018 - loads it

    def __repr__(self) -> str:
        name = self.model_name if isinstance(self.model_name, (str, Path)) else type(self.model_name).__name__
        return f"{type(self).__name__}({name})"

    @property
    def core(self) -> SamplingGenerator:
        """ragkit's generator; loads the model if it is not."""
        if self._core is None:
            model, tokenizer = self._load()
            self._core = SamplingGenerator(self.generation_config, model=model, tokenizer=tokenizer)
        return self._core

    def _load(self) -> tuple[Any, Any]:
        name, arguments = self.model_name, self.load_model_kwargs
        if not isinstance(name, (str, Path)):
            return name, self._tokenizer
        return _load_model(name, arguments), self._tokenizer or _load_tokenizer(name, arguments)

    @property
    def model(self) -> Any:
        """The transformers or PEFT model."""
        return self.core.model

    @model.setter
    def model(self, model: Any) -> None:
        if self._core is None:
            self.model_name = model
        else:
            self._core.model = model.eval()

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer."""
        return self.core.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self._tokenizer = getattr(tokenizer, "unwrapped", tokenizer)
        if self._core is not None:
            self._core.tokenizer = self._tokenizer

    @property
    def prompt_template(self) -> str | None:
        """The template as it was given."""
        return self._prompt_template

    @prompt_template.setter
    def prompt_template(self, text: str | None) -> None:
        as_template(text)  # an error now, not at the first query
        self._prompt_template = text

    def complete(self, prompt: Any, **unknown: Any) -> Any:
        """The continuation of a prompt, or of each prompt of a list."""
        refuse_unknown("complete", unknown, ["prompt"])
        many = isinstance(prompt, list)
        texts = self.core.complete([str(text) for text in (prompt if many else [prompt])])
        return texts if many else texts[0]

    def generate(self, query: Any, context: Any, **unknown: Any) -> Any:
        """The answer to a query from a context (text), or the answers to a list of queries from as many contexts."""
        refuse_unknown("generate", unknown, ["query", "context"])
        many = isinstance(query, list)
        queries, contexts = (query, context) if many else ([query], [context])
        if not isinstance(contexts, list) or len(queries) != len(contexts):
            found = len(contexts) if isinstance(contexts, list) else "one"
            raise ValueError(f"there must be one context for every query; found {len(queries)} queries, {found}")
        core, template = self.core, as_template(self.prompt_template)
        ids = [
            core.encode_prompt(template, str(text), [str(given)] if given else [], reserve=core.max_new_tokens)
            for text, given in zip(queries, contexts, strict=True)
        ]
        texts = core.generate_ids(ids)
        return texts if many else texts[0]

    def compute_target_sequence_proba(self, prompt: Any, target: str) -> Tensor:
        """P(target | prompt), float64; training uses its logarithm, which does not become 0 for long targets."""
        return torch.tensor(self.core.target_logprob(str(prompt), target), dtype=torch.float64).exp()


class HFPeftModelGenerator(HFPretrainedModelGenerator):
    """A causal language model with a PEFT adapter, which RALT trains on.

    Args:
        model_name: Folder or hub name of the adapter.
        base_model_name: The model under it.
        generation_config: As in `HFPretrainedModelGenerator`.
        prompt_template: As in `HFPretrainedModelGenerator`.
        load_model_kwargs: Arguments of `PeftModel.from_pretrained`.
        load_base_model_kwargs: Arguments of `AutoModelForCausalLM.from_pretrained`.
        load_model_at_init: As in `HFPretrainedModelGenerator`.
        tokenizer: Another tokenizer than that of the base model.
    """

    def __init__(
        self,
        model_name: Any,
        base_model_name: Any = None,
        generation_config: GenerationConfig | None = None,
        prompt_template: str | None = None,
        load_model_kwargs: dict[str, Any] | None = None,
        load_base_model_kwargs: dict[str, Any] | None = None,
        load_model_at_init: bool = True,
        **more: Any,
    ) -> None:
        if base_model_name is None and isinstance(model_name, (str, Path)):
            raise ValueError("HFPeftModelGenerator needs base_model_name, the model under the adapter")
        self.base_model_name = base_model_name
        self.load_base_model_kwargs = dict(load_base_model_kwargs or {})
        super().__init__(model_name, generation_config, prompt_template, load_model_kwargs, load_model_at_init, **more)

    def _load(self) -> tuple[Any, Any]:
        from peft import PeftModel, prepare_model_for_kbit_training  # takes a second to import

        if not isinstance(self.model_name, (str, Path)):
            return self.model_name, self._tokenizer
        arguments = self.load_base_model_kwargs
        base = _load_model(self.base_model_name, arguments)
        if "quantization_config" in arguments:
            base = prepare_model_for_kbit_training(base)
        try:
            with quiet():
                model = PeftModel.from_pretrained(base, str(self.model_name), **self.load_model_kwargs)
        except Exception as error:  # safetensors and peft raise their own types
            raise ValueError(f"no PEFT adapter could be loaded from {str(self.model_name)!r}: {error}") from error
        return model, self._tokenizer or _load_tokenizer(self.base_model_name, arguments)


def _load_model(name: Any, arguments: dict[str, Any]) -> Any:
    path = resolve_generator(str(name))
    try:
        with quiet():
            model: Any = AutoModelForCausalLM.from_pretrained(path, **arguments)
    except Exception as error:  # safetensors and tokenizers raise their own types for corrupt files
        raise ValueError(f"no language model could be loaded from {str(name)!r} ({path}): {error}") from error
    return model if "device_map" in arguments else model.to(resolve_device())


def _load_tokenizer(name: Any, arguments: dict[str, Any]) -> Any:
    trusted = bool(arguments.get("trust_remote_code", False))
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(resolve_generator(str(name)), trust_remote_code=trusted)
    except Exception as error:
        raise ValueError(f"no tokenizer could be loaded from {str(name)!r}: {error}") from error
