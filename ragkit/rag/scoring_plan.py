"""How pairs of prompt and response are put into batches: similar lengths, alike beginnings, a memory budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

MIB = 2**20
CPU_MIB = 48  # where nothing else is said: what leaves the processor's caches makes it slower, not faster
# A beginning is shared if that leaves out a quarter of all tokens or more, and it is not just a few.
SHORTEST_BEGINNING = 16
LARGEST_REST = 0.75


@dataclass(frozen=True)
class Batch:
    """Pairs that go through the model at once.

    Attributes:
        pairs: Their numbers.
        shared: Runs of pairs whose prompts begin alike, as `response_logprobs` takes them; () if none do.
    """

    pairs: tuple[int, ...]
    shared: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Cost:
    """Bytes that a forward pass without gradient needs at its peak, by estimate.

    Attributes:
        token: For each token, padding included: what one layer holds at once, and the states between the layers.
        square: For each pair and each two of its tokens: the mask and, where the attention keeps them, the scores.
        cached: For each token of a beginning or of what follows one: keys and values of all layers.
    """

    token: int
    square: int
    cached: int

    @classmethod
    def of(cls, core: Any) -> Cost:
        """From the sizes in the model's configuration."""
        config, size = core.config.get_text_config(), core.dtype.itemsize

        def number(*names: str, otherwise: int) -> int:
            values = [getattr(config, name, None) for name in names]
            return next((int(v) for v in values if isinstance(v, int) and v > 0), otherwise)

        hidden = number("hidden_size", "n_embd", "d_model", otherwise=1024)
        heads = number("num_attention_heads", "n_head", otherwise=max(1, hidden // 64))
        dim = number("head_dim", otherwise=hidden // heads)
        groups = number("num_key_value_heads", otherwise=heads)
        inner = number("intermediate_size", "n_inner", "ffn_dim", otherwise=4 * hidden)
        experts = number("num_experts_per_tok", "num_experts_per_token", otherwise=0)
        if experts:
            inner = max(inner, experts * number("moe_intermediate_size", otherwise=inner))
        layers = number("num_hidden_layers", "n_layer", otherwise=32)
        # Residual, norm, a layer's input and output; queries, keys and values before and after the rotation, and what
        # attention gives; gate, its activation, the other half and their product.
        live = 4 * hidden + 3 * (heads + groups) * dim + 4 * inner
        eager = getattr(config, "_attn_implementation", None) == "eager"
        return cls(live * size, 1 + eager * heads * (4 + 2 * size), 2 * layers * groups * dim * size)

    def bytes(self, pairs: int, width: int, beginnings: int = 0, beginning: int = 0) -> int:
        """Of `pairs` rows of `width` tokens that follow `beginnings` rows of `beginning` tokens."""
        first = beginnings * beginning * (self.token + beginning * self.square)
        cached = (pairs * (beginning + width) + beginnings * beginning) * self.cached if beginnings else 0
        return max(first, pairs * width * (self.token + (beginning + width) * self.square)) + cached


def budget_of(device: torch.device, memory_mib: int | None) -> int:
    """Bytes for a forward pass: what the user allows, else half of a GPU's free memory, or `CPU_MIB`."""
    if memory_mib is not None:
        return memory_mib * MIB
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free // 2
    return CPU_MIB * MIB


def common_beginning(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with alike; one of each is left out: it must predict the response."""
    # In the order of lists the first and the last differ earliest.
    first, last = min(map(list, prompts)), max(map(list, prompts))
    most = min(map(len, prompts)) - 1
    return next((i for i in range(most) if first[i] != last[i]), most)


def find_groups(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    groups: Sequence[int] | None,
    pairs: Sequence[int],
) -> tuple[list[tuple[list[int], int]], list[int]]:
    """Which pairs are to share their prompts' beginning.

    Args:
        prompts: All prompts.
        responses: All responses.
        groups: Of each pair, the question it belongs to; None: nothing is shared.
        pairs: The pairs in question.

    Returns:
        ([(pairs of a group, tokens they share)], the other pairs).
    """
    members: dict[int, list[int]] = {}
    if groups is not None:
        for i in pairs:
            members.setdefault(groups[i], []).append(i)
    found, taken = [], set()
    for group in members.values():
        shared = common_beginning([prompts[i] for i in group]) if len(group) > 1 else 0
        tokens = sum(len(prompts[i]) + len(responses[i]) for i in group)
        if shared >= SHORTEST_BEGINNING and tokens - (len(group) - 1) * shared <= LARGEST_REST * tokens:
            found.append((group, shared))
            taken.update(group)
    return found, [i for i in pairs if i not in taken]


def plan(
    lengths: Sequence[int],
    grouped: Sequence[tuple[list[int], int]],
    alone: Sequence[int],
    cost: Cost,
    budget: int,
    batch_size: int,
) -> list[Batch]:
    """Batches of similar length, longest first, so that memory runs out at once or never.

    Args:
        lengths: Tokens of each pair, prompt and response.
        grouped: Groups that share a beginning, as `find_groups` gives them.
        alone: The other pairs.
        cost: Bytes per token.
        budget: Most bytes of a batch; a single pair may need more.
        batch_size: Most pairs of a batch.
    """
    batches: list[Batch] = []
    open_pairs: list[int] = []
    for i in sorted(alone, key=lambda i: -lengths[i]):
        width = lengths[open_pairs[0]] if open_pairs else lengths[i]
        if open_pairs and (len(open_pairs) == batch_size or cost.bytes(len(open_pairs) + 1, width) > budget):
            batches.append(Batch(tuple(open_pairs)))
            open_pairs = []
        open_pairs.append(i)
    if open_pairs:
        batches.append(Batch(tuple(open_pairs)))
    return _plan_groups(lengths, grouped, cost, budget, batch_size) + batches


def _plan_groups(
    lengths: Sequence[int], grouped: Sequence[tuple[list[int], int]], cost: Cost, budget: int, batch_size: int
) -> list[Batch]:
    def rest(pairs: Sequence[int], shared: int) -> int:
        return max(lengths[i] for i in pairs) - shared

    parts: list[tuple[list[int], int]] = []
    waiting = list(grouped)
    while waiting:  # a group that is too large shares its beginning in parts
        pairs, shared = waiting.pop()
        too_much = cost.bytes(len(pairs), rest(pairs, shared), 1, shared) > budget
        if len(pairs) > 1 and (len(pairs) > batch_size or too_much):
            half = (len(pairs) + 1) // 2
            waiting += [(pairs[:half], shared), (pairs[half:], shared)]
        else:
            parts.append((pairs, shared))
    parts.sort(key=lambda part: (-rest(*part), -part[1]))
    batches: list[Batch] = []
    held: list[tuple[list[int], int]] = []
    for part in parts:
        new = [*held, part]
        count, longest = sum(len(pairs) for pairs, _ in new), max(shared for _, shared in new)
        needed = cost.bytes(count, rest(*new[0]), len(new), longest)
        if held and (count > batch_size or needed > budget):
            batches.append(_joined(held))
            new = [part]
        held = new
    return [*batches, _joined(held)] if held else batches


def _joined(parts: Sequence[tuple[list[int], int]]) -> Batch:
    return Batch(tuple(i for pairs, _ in parts for i in pairs), tuple((len(pairs), shared) for pairs, shared in parts))


def bytes_of(batch: Batch, lengths: Sequence[int], cost: Cost) -> int:
    """What a batch needs by estimate."""
    if not batch.shared:
        return cost.bytes(len(batch.pairs), max(lengths[i] for i in batch.pairs))
    starts = [shared for pairs, shared in batch.shared for _ in range(pairs)]
    width = max(lengths[i] - start for i, start in zip(batch.pairs, starts, strict=True))
    return cost.bytes(len(batch.pairs), width, len(batch.shared), max(starts))
