"""Chat templates: what they put around a prompt, before an answer and after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# An answer that no template changes (some strip white space), and that stands nowhere else in a conversation.
_ANSWER = "xqz"


@dataclass(frozen=True)
class AnswerFrame:
    """How a chat template writes an answer behind the prompt that it ends with `add_generation_prompt`.

    Attributes:
        prefix: White space that it puts before the answer.
        end_id: The special token that it puts after it: "<|im_end|>", "<|eot_id|>", "<end_of_turn>", ..., which is not
            always the tokenizer's EOS token; that one where it puts none there.
    """

    prefix: str
    end_id: int | None


def render_chat(tokenizer: Any, prompt: str, system_prompt: str | None = None, answer: str | None = None) -> str:
    """The conversation as text: up to where the answer begins, or with the answer."""
    turns = [{"role": "system", "content": system_prompt}] if system_prompt else []
    turns.append({"role": "user", "content": prompt})
    if answer is not None:
        turns.append({"role": "assistant", "content": answer})
    return str(tokenizer.apply_chat_template(turns, add_generation_prompt=answer is None, tokenize=False))


def answer_frame(tokenizer: Any, system_prompt: str | None = None) -> AnswerFrame:
    """What the tokenizer's chat template puts around an answer, found by giving it one.

    Nothing and the EOS token, where the conversation with an answer does not go on from the prompt, or where the end
    of a turn is spelled in ordinary letters.
    """
    begun = render_chat(tokenizer, "?", system_prompt)
    whole = render_chat(tokenizer, "?", system_prompt, _ANSWER)
    before, found, after = whole[len(begun) :].partition(_ANSWER) if whole.startswith(begun) else ("", "", "")
    if not found:
        return AnswerFrame("", tokenizer.eos_token_id)
    ids = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"]
    known = getattr(tokenizer, "added_tokens_decoder", {})
    ends = bool(ids) and ids[0] in known and known[ids[0]].special
    # More than white space (an empty block of thoughts) is not put into the model's mouth: it would stay in answers.
    return AnswerFrame("" if before.strip() else before, int(ids[0]) if ends else tokenizer.eos_token_id)
