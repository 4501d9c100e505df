"""The generator: any causal language model that answers from passages, and that scores answers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, LogitsProcessorList, PreTrainedModel

from ragkit.files import atomic_dir
from ragkit.prompts import PromptTemplate, fit, get_template
from ragkit.rag.chat import AnswerFrame, answer_frame, render_chat
from ragkit.rag.ensemble import EnsembleProcessor, ensemble_batches
from ragkit.rag.loading import (
    can_keep_name,
    digests,
    digests_if_named,
    evaluating,
    load_causal_lm,
    quiet,
    resolve_device,
    with_adapter,
    without_adapter,
)
from ragkit.rag.scoring import score_responses


class TokenizerError(ValueError):
    """A tokenizer that cannot be used for generation."""


class Generator:
    """A causal LM with its tokenizer and prompt format.

    Args:
        model: Name on the hub, folder, or a live `PreTrainedModel` or `PeftModel`; `"default"` is the shipped tiny LM.
        tokenizer: Needed with a live model; by default the one of `model`.
        adapter: Folder or hub name of a PEFT adapter to put on the model. It must be one that sits in the layers
            (LoRA, IA3, ...), not one that prepends virtual tokens.
        chat_template: Puts the prompt into the tokenizer's chat template, as the user's turn.
        system_prompt: The system turn before it; needs `chat_template`.
        device: `"auto"`, `"cpu"`, `"cuda"`, ...; with `"auto"` a live model stays where it is.
        dtype: `"auto"` (as the weights are stored), `"float32"`, `"bfloat16"` or `"float16"`; not for live models.
        max_new_tokens: Longest answer in tokens.
        batch_size: Prompts generated for at once.
        max_prompt_tokens: Longer prompts have their passages cut; None leaves what the model's context allows.
        trust_remote_code: Runs code that a model on the hub brings. Only for models that you trust.

    Raises:
        TokenizerError: No tokenizer, or one that can neither pad nor end a text, or has no chat template.
        ValueError: The model or the adapter cannot be loaded.
    """

    def __init__(
        self,
        model: Any = "default",
        tokenizer: Any = None,
        adapter: str | Path | None = None,
        chat_template: bool = False,
        system_prompt: str | None = None,
        device: str | torch.device | None = "auto",
        dtype: str = "float32",
        max_new_tokens: int = 32,
        batch_size: int = 16,
        max_prompt_tokens: int | None = None,
        trust_remote_code: bool = False,
    ):
        self.chat_template, self.system_prompt = chat_template, system_prompt
        self.max_new_tokens, self.batch_size, self.max_prompt_tokens = max_new_tokens, batch_size, max_prompt_tokens
        self.source: str | None = None
        self._loaded: Counter[str] | None = None
        if isinstance(model, (str, Path)):
            self.source = str(model)
            model, own_tokenizer = load_causal_lm(self.source, dtype, trust_remote_code, tokenizer is None)
            self._loaded = digests_if_named(self.source, model)
            model = model.to(resolve_device(device))
            tokenizer = own_tokenizer if tokenizer is None else tokenizer
        elif device not in (None, "auto"):
            model = model.to(device)
        if isinstance(tokenizer, (str, Path)):
            tokenizer = AutoTokenizer.from_pretrained(str(tokenizer), trust_remote_code=trust_remote_code)
        if tokenizer is None:
            raise TokenizerError("a live model needs its tokenizer: Generator(model, tokenizer=...)")
        self.tokenizer = tokenizer
        self.model = model if adapter is None else with_adapter(model, adapter)
        self.model.eval()
        self._check()

    def _check(self) -> None:
        self.core  # noqa: B018 - refuses adapters that cannot be used
        if self.pad_id is None:
            raise TokenizerError(
                "the tokenizer has neither a pad nor an EOS token, so batches cannot be padded and answers cannot "
                'end; set one first, for example tokenizer.add_special_tokens({"eos_token": "</s>"}) and '
                "model.resize_token_embeddings(len(tokenizer))"
            )
        if self.chat_template and not getattr(self.tokenizer, "chat_template", None):
            raise TokenizerError("chat_template is on, but the tokenizer has none; turn it off or set the template")
        if self.system_prompt and not self.chat_template:
            raise TokenizerError("system_prompt needs chat_template: without one there is no system turn")

    def __repr__(self) -> str:
        adapted = ", adapter" if hasattr(self.model, "peft_config") else ""
        return f"Generator({self.source or type(self.model).__name__}{adapted}, device={str(self.device)!r})"

    @property
    def core(self) -> PreTrainedModel:
        """The transformers model itself; a PEFT adapter sits inside its layers and stays active."""
        for config in getattr(self.model, "peft_config", {}).values():
            if getattr(config, "is_prompt_learning", False):
                raise ValueError(
                    f"the adapter type {config.peft_type} prepends virtual tokens; "
                    "use one that sits in the layers, such as LoRA"
                )
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def device(self) -> torch.device:
        """Where the input goes."""
        return self.core.device

    @property
    def eos_id(self) -> int | None:
        """The tokenizer's EOS token; None if it has none."""
        return self.tokenizer.eos_token_id

    @property
    def end_id(self) -> int | None:
        """The token that ends a response: the chat template's own end of a turn, else the EOS token."""
        return self._frame().end_id

    def _frame(self) -> AnswerFrame:
        return answer_frame(self.tokenizer, self.system_prompt) if self.chat_template else AnswerFrame("", self.eos_id)

    @property
    def pad_id(self) -> int | None:
        """The token that fills a batch up: the pad token, else the EOS token (masked either way)."""
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.eos_id

    @property
    def max_length(self) -> int | None:
        """Most tokens (prompt and response) the model has positions for; None if it sets no limit."""
        config = self.core.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        return int(limit) if limit else None

    def encode_prompt(
        self, template: str | PromptTemplate, question: str, passages: Sequence[Any], reserve: int = 0
    ) -> list[int]:
        """Token ids of the prompt, its passages cut to what there is room for.

        Args:
            template: Name, text or template; the same one for training and for inference.
            question: The question.
            passages: Strings or passages, best first.
            reserve: Tokens kept free for the response: its length in training, `max_new_tokens` in generation.

        Raises:
            PromptError: It does not fit even with empty passages.
        """
        limit = self.max_length - reserve if self.max_length is not None else None
        budgets = [budget for budget in (limit, self.max_prompt_tokens) if budget is not None]
        template = get_template(template)
        if not budgets:
            return self._prompt_ids(template.render(question, passages))
        prompt = fit(template, self.tokenizer, question, passages, min(budgets), encode=self._prompt_ids)
        return self._prompt_ids(prompt)

    def _prompt_ids(self, prompt: str) -> list[int]:
        if self.chat_template:
            text = render_chat(self.tokenizer, prompt, self.system_prompt)
            return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        ids = list(self.tokenizer(prompt, verbose=False)["input_ids"])  # too long is no news here: `fit` cuts it
        if len(ids) > 1 and ids[-1] == self.eos_id:  # some tokenizers end every text; the answer is still to come
            ids.pop()
        return ids

    def encode_response(self, text: str, eos: bool = True, template: str | PromptTemplate | None = None) -> list[int]:
        """Token ids of a response as they follow a prompt's: prompt and response are joined as ids, never as text.

        Args:
            text: The answer.
            eos: Ends it with `end_id`, which training needs: without it the model never learns to stop.
            template: Gives the `response_prefix`, a space by default; with a chat template that one's own.

        Raises:
            TokenizerError: `eos` is on, but the tokenizer has no EOS token.
        """
        frame = self._frame()
        if eos and frame.end_id is None:
            raise TokenizerError("the tokenizer has no EOS token to end the response with; set one or pass eos=False")
        prefix = " " if template is None else get_template(template).response_prefix
        # SentencePiece tokenizers put a space before a text that stands alone; behind an anchor they do not.
        anchor = "\n" if self.chat_template else ":"
        head = list(self.tokenizer(anchor, add_special_tokens=False)["input_ids"])
        text = (frame.prefix if self.chat_template else prefix) + text.strip()
        ids = list(self.tokenizer(anchor + text, add_special_tokens=False)["input_ids"])
        if ids[: len(head)] == head:
            ids = ids[len(head) :]
        else:  # the anchor grew into the text's first token
            ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return [*ids, frame.end_id] if eos and frame.end_id is not None else ids

    def generate_ids(self, prompts: Sequence[Sequence[int]], max_new_tokens: int | None = None) -> list[str]:
        """Greedy answers to prompts given as token ids.

        Batches hold prompts of similar length, padded on the left under an attention mask, so that a prompt is
        answered the same alone and in a batch. Sampling settings that a model brings along are not used.

        Args:
            prompts: Token ids from `encode_prompt`.
            max_new_tokens: Longest answer; the generator's own by default.

        Returns:
            The answers in the order of the prompts, without special tokens and outer white space.
        """
        limit = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        answers = [""] * len(prompts)
        for batch in _batches([len(prompt) for prompt in prompts], self.batch_size):
            new = self._generate_batch([list(prompts[i]) for i in batch], limit)
            for i, ids in zip(batch, new.tolist(), strict=True):
                answers[i] = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
        return answers

    def generate_ensemble(
        self,
        prompts: Sequence[Sequence[Sequence[int]]],
        weights: Sequence[Sequence[float]],
        max_new_tokens: int | None = None,
    ) -> list[str]:
        """Greedy answers from several prompts a question, whose next-token distributions are mixed.

        Args:
            prompts: For each question its prompts as token ids, one a passage; see `EnsembleProcessor`.
            weights: For each question the weight of each prompt, adding up to 1.
            max_new_tokens: Longest answer; the generator's own by default.

        Returns:
            One answer a question. At most `batch_size` prompts go through the model at once, or one question.

        Raises:
            ValueError: A question without a prompt, or with another number of weights.
        """
        limit = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        answers = [""] * len(prompts)
        for batch in ensemble_batches(prompts, weights, self.batch_size):
            mix = EnsembleProcessor([weights[i] for i in batch], self.device)
            new = self._generate_batch([list(ids) for i in batch for ids in prompts[i]], limit, mix).tolist()
            for i, row in zip(batch, mix.first_rows, strict=True):  # all rows of a question are the same
                answers[i] = self.tokenizer.decode(new[row], skip_special_tokens=True).strip()
        return answers

    def _generate_batch(self, prompts: list[list[int]], limit: int, mix: EnsembleProcessor | None = None) -> Tensor:
        width = max(map(len, prompts))
        assert self.pad_id is not None  # checked when the generator was made
        ids = torch.full((len(prompts), width), self.pad_id)  # [B, T]
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        model, own = self.core, self.core.generation_config
        # `generate` fills what a given configuration leaves open from the model's own (temperature, penalties, ...),
        # so the model's own is put aside for the call.
        # A sampled token would differ among the prompts that are mixed.
        model.generation_config = self._decoding(limit) if mix is None else Generator._decoding(self, limit)
        try:
            with torch.no_grad(), evaluating(model), quiet():
                out = model.generate(  # type: ignore[operator]
                    input_ids=ids.to(self.device),
                    attention_mask=mask.to(self.device),
                    tokenizer=self.tokenizer,
                    logits_processor=LogitsProcessorList([] if mix is None else [mix]),
                )
        finally:
            model.generation_config = own
        return out[:, width:].cpu()  # [B, new tokens]

    def _decoding(self, limit: int) -> GenerationConfig:
        """How answers are found: greedily, to an end token or `limit` tokens. A subclass may sample."""
        own = self.core.generation_config
        assert own is not None
        ends = {self.eos_id, self.end_id} | set(
            own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
        )
        return GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=limit,
            pad_token_id=self.pad_id,
            eos_token_id=sorted(end for end in ends if end is not None) or None,
        )

    def sequence_logprob(
        self,
        prompt_ids: Sequence[Sequence[int]],
        response_ids: Sequence[Sequence[int]],
        batch_size: int | None = None,
        **options: Any,
    ) -> Tensor:
        r"""log P(response | prompt): the sum of the log-probabilities of the response's tokens, in nats.

        Equals -(the model's own loss with labels -100 on the prompt) x (number of response tokens). Only the positions
        that predict a response token go through the LM head, so no [B, T, V] logits are made.

        Args:
            prompt_ids: N prompts from `encode_prompt`; none empty.
            response_ids: N responses from `encode_response`; an empty one has log-probability 0.
            batch_size: Most pairs scored at once; the generator's own by default.
            **options: `memory_mib`, `groups`, `names`, `progress`, `on_batch` of `ragkit.rag.scoring.score_responses`.

        Returns:
            float64 [N] on the CPU, without gradient.

        Raises:
            ScoringError: A pair that is too long or has unknown tokens, or scores that are not finite.
        """
        if len(prompt_ids) != len(response_ids):
            raise ValueError(f"{len(prompt_ids)} prompts, but {len(response_ids)} responses")
        return score_responses(
            self.core,
            prompt_ids,
            response_ids,
            self.pad_id or 0,
            batch_size=batch_size or self.batch_size,
            max_length=self.max_length,
            **options,
        )

    def save(self, directory: str | Path) -> Path:
        """Writes tokenizer, settings and weights.

        A model taken by name and not trained is kept as its name. With an adapter the adapter is written, and the
        model under it by the same rule, so that a LoRA on a large model from the hub stays small.
        """
        with atomic_dir(directory) as folder, quiet():
            keep = can_keep_name(self._loaded, self.model)
            adapted = hasattr(self.model, "peft_config")
            if adapted:
                self.model.save_pretrained(str(folder / "adapter"))
            if not keep:
                state = without_adapter(self.core) if adapted else None
                self.core.save_pretrained(str(folder / "model"), state_dict=state)
            self.tokenizer.save_pretrained(str(folder / "tokenizer"))
            settings = {
                "model": self.source if keep else None,
                "digests": sorted((self._loaded or Counter()).elements()) if keep else None,
                "adapter": adapted,
                "dtype": str(self.core.dtype).removeprefix("torch."),
                "chat_template": self.chat_template,
                "system_prompt": self.system_prompt,
                "max_new_tokens": self.max_new_tokens,
                "batch_size": self.batch_size,
                "max_prompt_tokens": self.max_prompt_tokens,
            }
            (folder / "generator.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        return Path(directory)

    @classmethod
    def load(
        cls, directory: str | Path, device: str | torch.device | None = "auto", trust_remote_code: bool = False
    ) -> Generator:
        """Reads what `save` wrote.

        Raises:
            ValueError: A file is missing or corrupt (the message names it), or a model that was kept as its name is
                not the one that was saved.
        """
        folder = Path(directory)
        path = folder / "generator.json"
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
            name, saved, adapted = (settings.pop(key) for key in ("model", "digests", "adapter"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not a saved generator, or it was cut off ({error!r})") from error
        wanted = ["tokenizer"] + ["model"] * (name is None) + ["adapter"] * adapted
        for part in wanted:
            if not (folder / part).is_dir():
                raise ValueError(f"{folder / part}: missing; the folder was cut off while it was written or copied")
        generator = cls(
            str(folder / "model") if name is None else name,
            tokenizer=str(folder / "tokenizer"),
            adapter=folder / "adapter" if adapted else None,
            device=device,
            trust_remote_code=trust_remote_code,
            **settings,
        )
        if name is not None and Counter(saved) - digests(generator.core):
            raise ValueError(f"the model {name!r} is not the one that was saved: its weights have changed since")
        return generator


def _batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of similar length, longest first, so that an out-of-memory error comes at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
