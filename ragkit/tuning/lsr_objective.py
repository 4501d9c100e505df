"""What LSR minimises: which scores the teacher's distribution is made of, and further candidates from the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from ragkit_kernels.lsr_loss import lsr_loss
from torch import Tensor
from torch.nn.functional import pad

from ragkit.lsr_config import LSRConfig

# What the language model is asked for: rows hold logarithms, whatever Q_LM is made of.
LOG_SCORE = {
    "mean_logprob": "mean_logprob",
    "token_prob": "mean_logprob",
    "logprob": "logprob",
    "prob": "logprob",
}


def teacher_values(lm_scores: Tensor, score: str) -> Tensor:
    """The v of Q_LM = softmax(v / beta).

    | score        | v                                                                                           |
    |--------------|---------------------------------------------------------------------------------------------|
    | mean_logprob | mean log-prob of the answer's tokens                                                        |
    | logprob      | log p_LM(y \\| d, q), their sum                                                              |
    | token_prob   | exp(mean log-prob), the geometric mean of the tokens' probabilities: in (0, 1], any length  |
    | prob         | p_LM(y \\| d, q), as in REPLUG (arXiv:2301.12652, section 4) and RA-DIT (arXiv:2310.01352)   |

    The probability is taken here, in float64, of a logarithm that never left the log domain: it is 0 only where it is
    below 1e-308, and what is far below beta counts for nothing in the softmax anyway.

    Args:
        lm_scores: [B, K] in nats, as rows hold them: sums for "logprob" and "prob", else means.
        score: One of the four.

    Returns:
        [B, K] float32.
    """
    if score in ("mean_logprob", "logprob"):
        return lm_scores
    return lm_scores.double().exp().float()


def batch_negatives(passage_ids: Sequence[Sequence[str]]) -> list[list[str]]:
    """For each question the passages that only the other questions of the batch have, each once, in their order."""
    everything = list(dict.fromkeys(passage for ids in passage_ids for passage in ids))
    owned = [set(ids) for ids in passage_ids]
    return [[passage for passage in everything if passage not in own] for own in owned]


def lsr_objective(scores: Tensor, lm_scores: Tensor, own: Tensor, others: Tensor | None, config: LSRConfig) -> Tensor:
    r"""The LSR loss, where asked for over candidates that the language model did not score.

    Without `others` it is `ragkit_kernels.lsr_loss`. With them, P_R is a softmax over the question's own K passages
    *and* N negatives, as in-batch negatives are in dense retrieval (Karpukhin et al. 2020, arXiv:2004.04906, section
    3.2), and Q_LM has to say something of passages that no language model read:

    - KL(Q_LM||P_R): 0. The divergence stays finite and is exact,
      KL(Q‖P) = KL(Q‖P_own) − log Σ_own P_R, a soft-label InfoNCE: P_own is P_R among the own passages, and the second
      term drives the mass of the negatives to 0.
    - KL(P_R||Q_LM) is infinite for a zero. So Q_LM keeps its shape on the own passages with the mass 1 − ε, and ε =
      `in_batch_floor` is spread evenly over the N negatives. With m = Σ_own P_R (chain rule),
      KL(P‖Q) = kl(m ‖ 1−ε) + m·KL(P_own‖Q_own) + (1−m)·KL(P_neg‖uniform): least at m = 1 − ε. A larger floor punishes
      a negative less.

    Both take it that a passage retrieved for another question only does not help with this one. Where many questions
    share their passages that is untrue; then leave in_batch_negatives off.

    Args:
        scores: [B, W] retrieval scores with gradient, already rescaled.
        lm_scores: [B, W] the teacher's, in nats; read where `own` is True.
        own: [B, W] bool, the passages that the teacher scored.
        others: [B, W] bool, the negatives; None: there are none.
        config: gamma, beta, direction, score and in_batch_floor are read.

    Returns:
        Scalar, the mean over the batch.
    """
    values = teacher_values(lm_scores, config.score)
    if others is None:
        return lsr_loss(scores, values, config.gamma, config.beta, config.direction, own)
    everyone = own | others
    if config.direction == "KL(Q_LM||P_R)":
        loss = lsr_loss(scores, values, config.gamma, config.beta, config.direction, own)
        logits = scores.float() / config.gamma
        all_mass = logits.masked_fill(~everyone, -torch.inf).logsumexp(-1)  # [B, W] -> [B]
        own_mass = logits.masked_fill(~own, -torch.inf).logsumexp(-1)
        return loss + (all_mass - own_mass).mean()
    count = others.sum(-1, keepdim=True)  # [B, 1]
    floor = torch.where(count > 0, config.in_batch_floor, 0.0).double()
    log_q = (values.double() / config.beta).masked_fill(~own, -torch.inf).log_softmax(-1)
    log_q = log_q + torch.log1p(-floor)
    log_q = torch.where(others, (floor / count.clamp(min=1)).log(), log_q)
    # As scores of a teacher with temperature beta, so that one kernel serves all cases.
    teacher = (log_q * config.beta).masked_fill(~everyone, 0.0).float()
    return lsr_loss(scores, teacher, config.gamma, config.beta, config.direction, everyone)


def widen(mask: Tensor, width: int) -> Tensor:
    """[B, K] -> [B, width], filled with zeros (False)."""
    return pad(mask, (0, width - mask.shape[1]))
