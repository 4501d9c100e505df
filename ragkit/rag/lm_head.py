"""The head of a causal LM: the weight that turns its hidden states into logits, and what is done to them after.

Scoring and training need the logits of few positions only, and never all of them at once. For that the model is taken
apart: its layers give hidden states, `ragkit_kernels.linear_logprob` does the rest with the head's own weight. Whether
the parts make the same logits as the model is not believed but tried out, once for a model.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from ragkit_kernels.linear_logprob import token_logprobs
from torch import Tensor, nn

from ragkit.rag.loading import evaluating

# What configurations call the cap of the logits (cap · tanh(logits / cap)): Gemma 2 and later, RecurrentGemma, xLSTM.
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap", "logit_softcap", "softcap")
# What they call a factor on the logits: Cohere, Falcon-H1, Muse; Granite divides by its own, HyperCLOVA X multiplies.
FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier", "logits_scaling")
DIVISORS = ("logits_scaling",)
# The logits tried out reach from 1 to far beyond any cap, so that one that was missed shows.
AMPLITUDES = (1.0, 30.0, 1000.0)
# Relative to the largest logit of a position; both sides make theirs by the same product.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class LMHead:
    """logits = cap(logit_scale · (hidden · weightᵀ + bias)), with cap(z) = softcap · tanh(z / softcap).

    Attributes:
        weight: [V, D] the parameter itself, so that gradients reach it; tied or not.
        bias: [V], or None.
        logit_scale: Factor on the logits (Granite, Cohere, MiniCPM, ...).
        softcap: Bound of the logits (Gemma), or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """All logits of hidden states [..., D]: [..., V]. For few rows; `token_logprobs` needs none."""
        logits = nn.functional.linear(hidden, self.weight, self.bias) * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def token_logprobs(
        self, hidden: Tensor, targets: Tensor, positions: Tensor | None = None, **options: Any
    ) -> Tensor:
        """`ragkit_kernels.linear_logprob.token_logprobs` with this head.

        Args:
            hidden: [N, D] hidden states.
            targets: [T] int64 token ids.
            positions: [T] int64, the rows of `hidden` that predict the targets; None: all rows, T = N.
            **options: `temperature`, `ignore_index`, `chunk_rows`, ... of the operator.

        Returns:
            float32 [T], in nats; differentiable.
        """
        device = self.weight.device
        hidden, targets = hidden.to(device), targets.to(device)
        positions = positions if positions is None else positions.to(device)
        if not torch.is_autocast_enabled(device.type):
            hidden = hidden.to(self.weight.dtype)
        return token_logprobs(hidden, self.weight, targets, positions, **self.arguments(), **options)

    def arguments(self) -> dict[str, Any]:
        """bias, logit_scale and softcap as the operators of `linear_logprob` take them."""
        return {"bias": self.bias, "logit_scale": self.logit_scale, "softcap": self.softcap}


@dataclass(frozen=True)
class _Reading:
    """What was found out about one model's head, and for which state of it."""

    state: tuple[Any, ...]
    logit_scale: float = 1.0
    softcap: float | None = None
    problem: str = ""


_readings: WeakKeyDictionary[nn.Module, _Reading] = WeakKeyDictionary()


def core_of(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper, whose adapters sit in the layers; else the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def read_head(model: Any) -> LMHead | None:
    """The head of a causal LM, if its logits are what `LMHead.logits` makes of `hidden_states`.

    Args:
        model: A transformers causal LM, or a `PeftModel` of one. Ask before a trainer wraps it.

    Returns:
        The head; None if it is not one of this form (an adapter on the head, a quantised or a sharded weight, other
        arithmetic after it). Then the model's own logits are the only way, and a warning has said why, once.
    """
    core = core_of(model)
    head = core.get_output_embeddings()
    state = (id(head), id(core.base_model), *_options(core))
    reading = _readings.get(core)
    if reading is None or reading.state != state:  # an adapter was put on, or the configuration changed
        problem = _obstacle(model, core, head)
        reading = _Reading(state, problem=problem) if problem else _try_out(core, head, state)
        _readings[core] = reading
        if reading.problem:
            warnings.warn(
                f"{type(core).__name__}: {reading.problem}; its own logits are used, which takes more memory and time",
                stacklevel=2,
            )
    return None if reading.problem else LMHead(head.weight, head.bias, reading.logit_scale, reading.softcap)


def hidden_states(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
    """What the head of a causal LM sees: the hidden states after the last norm, with gradient where it is on.

    Args:
        model: A model whose head `read_head` could read.
        input_ids: int64 [B, T].
        attention_mask: [B, T], 1 for tokens and 0 for padding; None: no padding.
        **options: Further arguments of the model (`position_ids`, ...). `use_cache` is off unless given.

    Returns:
        [B, T, D] in the model's dtype.
    """
    options.setdefault("use_cache", False)
    return core_of(model).base_model(input_ids=input_ids, attention_mask=attention_mask, **options).last_hidden_state


def _options(core: Any) -> tuple[tuple[str, Any], ...]:
    """What the configuration says about the logits."""
    config = core.config.get_text_config()
    names = dict.fromkeys((*CAPS, *FACTORS, "dim_model_base", "hidden_size"))
    return tuple((name, getattr(config, name, None)) for name in names)


def _obstacle(model: Any, core: Any, head: Any) -> str:
    """Why the head is none that can be read, as far as that can be said without trying; "" if there is nothing."""
    if any(getattr(c, "is_prompt_learning", False) for c in getattr(model, "peft_config", {}).values()):
        return "its adapter prepends virtual tokens"
    if not isinstance(head, nn.Linear):
        found = (
            "no output embeddings" if head is None else f"a head of type {type(head).__module__}.{type(head).__name__}"
        )
        return f"it has {found} instead of one linear layer (an adapter on the head makes it two)"
    if core.base_model is core:
        return "its layers cannot be run without its head"
    weight = head.weight
    if weight.is_meta or not weight.is_floating_point() or hasattr(weight, "device_mesh"):
        return "the weight of its head is quantised, sharded or not in memory"
    return ""


@torch.no_grad()
def _try_out(core: Any, head: nn.Linear, state: tuple[Any, ...]) -> _Reading:
    """Compares the model's logits with every reading of its configuration, the likeliest first."""
    body, weight = core.base_model, head.weight
    ids = (torch.arange(8, device=core.device) % core.get_input_embeddings().weight.shape[0]).unsqueeze(0)  # [1, T]
    large = _large_hidden_states(weight)  # [1, T, D]
    replaced: list[str] = []

    def replace_output(_: Any, __: Any, output: Any) -> Any:
        if getattr(output, "last_hidden_state", None) is not None:
            output.last_hidden_state = large.to(output.last_hidden_state)
            replaced.append("layers")
        return output

    def replace_input(_: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if replaced:
            return None
        replaced.append("head")  # OPT runs what is inside its base model, not the base model itself
        return (large.to(given[0]), *given[1:])

    with evaluating(core):
        hidden = getattr(body(input_ids=ids, use_cache=False), "last_hidden_state", None)
        own = core(input_ids=ids, use_cache=False).logits
        handles = [body.register_forward_hook(replace_output), head.register_forward_pre_hook(replace_input)]
        try:
            tried = core(input_ids=ids, use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
    if hidden is None or len(replaced) != 1 or own.shape != (1, 8, weight.shape[0]):
        return _Reading(state, problem="its logits are not made from the hidden states of its layers alone")
    if not torch.isfinite(own).all():
        return _Reading(state, problem="its logits are not finite")
    tolerance = TOLERANCE.get(weight.dtype, 1e-3)
    for scale, cap in _candidates(core):
        reading = LMHead(weight, head.bias, scale, cap)
        pairs = ((reading.logits(hidden.to(weight)), own), (reading.logits(large), tried))
        if all(_equal(mine, theirs, tolerance) for mine, theirs in pairs):
            return _Reading(state, scale, cap)
    return _Reading(state, problem="its logits are not those of its head's weight, scaled and capped as it says")


def _large_hidden_states(weight: Tensor) -> Tensor:
    """[1, 8, D] random hidden states whose largest products with the weight have the sizes in `AMPLITUDES`."""
    new = torch.randn(8, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)  # [T, D]
    largest = nn.functional.linear(new, weight).float().abs().amax(1, keepdim=True).clamp(min=1e-6)  # [T, 1]
    wanted = torch.tensor([AMPLITUDES[i % len(AMPLITUDES)] for i in range(8)], device=weight.device).unsqueeze(1)
    return (new.float() * wanted / largest).to(weight.dtype).unsqueeze(0)


def _candidates(core: Any) -> Iterator[tuple[float, float | None]]:
    """(scale, cap) pairs that the configuration allows. A model may hold a setting that it does not use."""
    found = {name: float(v) for name, v in _options(core) if isinstance(v, int | float) and not isinstance(v, bool)}
    scales = [found[name] for name in FACTORS if name in found and name not in DIVISORS]
    scales = [1 / found[name] for name in DIVISORS if found.get(name)] + scales
    scales += [found[name] for name in DIVISORS if name in found]
    if found.get("dim_model_base") and found.get("hidden_size"):
        scales.append(found["dim_model_base"] / found["hidden_size"])  # MiniCPM divides the hidden states
    caps = [found[name] for name in CAPS if found.get(name, 0) > 0]
    for cap in (*dict.fromkeys(caps), None):
        for scale in dict.fromkeys((*scales, 1.0)):
            yield scale, cap


def _equal(mine: Tensor, theirs: Tensor, tolerance: float) -> bool:
    mine, theirs = mine.float(), theirs.to(mine.device).float()
    return bool(((mine - theirs).abs() <= tolerance * theirs.abs().amax(-1, keepdim=True)).all())
