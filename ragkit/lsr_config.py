"""The settings of LSR, the training of the retriever."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from ragkit.base_config import DataConfig, RAGConfig, TrainConfig
from ragkit.settings import Config, group, setting

LSR_PRESETS: dict[str, dict[str, Any]] = {
    # REPLUG LSR (Shi et al. 2023, arXiv:2301.12652): both temperatures 0.1, KL from the retriever to the LM. The paper
    # divides the probability itself; here it is the mean log-prob, which does not underflow on long answers.
    "replug": {"gamma": 0.1, "beta": 0.1, "score": "mean_logprob", "direction": "KL(P_R||Q_LM)"},
    # RA-DIT (Lin et al. 2023, arXiv:2310.01352): sharp target (0.01), only the query encoder is trained. Its dot
    # products are not normalised (no gamma); ours are cosines, which need one to leave the flat part of the softmax.
    "ra_dit": {
        "gamma": 0.05,
        "beta": 0.01,
        "score": "mean_logprob",
        "direction": "KL(P_R||Q_LM)",
        "train_part": "query",
    },
    # FedRAG (VectorInstitute/fed-rag, loss/pytorch/lsr.py): kl_div(log_softmax(s), softmax(lm)) is KL(Q_LM||P_R), and
    # neither softmax has a temperature. Theirs is the probability of the whole answer, which underflows to a uniform
    # target; here it is the mean log-prob. For comparison, not for use: gamma = 1 over
    # cosines is nearly flat, and 40 steps on the small world took recall@1 from .65 to .47 (our defaults: to .81).
    "fedrag": {"gamma": 1.0, "beta": 1.0, "score": "mean_logprob", "direction": "KL(Q_LM||P_R)"},
}


NO_CHECKPOINTING = (
    "train.gradient_checkpointing: false, as the encoders stay in eval mode, where it has no effect; use a smaller "
    "train.batch_size with train.gradient_accumulation_steps"
)


class LSRConfig(Config):
    """Fine-tunes the retriever from the language model's own scores of the passages (LSR)."""

    preset: Literal["replug", "ra_dit", "fedrag"] | None = setting(
        None,
        "Values of a paper (replug, ra_dit) or of another kit (fedrag) for the settings that you leave alone; null: "
        "ragkit's defaults.",
    )
    data: DataConfig = group(DataConfig(), "passages and questions")
    rag: RAGConfig = group(RAGConfig(), "the RAG system whose retriever is trained")
    system: str | None = setting(
        None, "Folder of a saved RAG system to go on from; null: a new one, built from data and rag."
    )
    train: TrainConfig = group(TrainConfig(learning_rate=2e-5, batch_size=16), "batches, optimizer, checkpoints")
    top_k: int = setting(
        8, "Passages scored for each question while training (K); rag.top_k is in use.", unit="passages", ge=2
    )
    gamma: float = setting(
        0.05, "Temperature of the retriever: P_R = softmax(similarity / gamma).", unit="similarity", gt=0, le=100
    )
    rescale: Literal["auto", "on", "off"] = setting(
        "auto",
        "Multiplies the retriever's scores by one constant, so that they spread as cosines do and gamma means the "
        "same; auto: where they are not cosines, as a GFM's.",
    )
    beta: float = setting(
        1.0, "Temperature of the LM: Q_LM = softmax(score / beta).", unit="unit of the score", gt=0, le=1000
    )
    direction: Literal["KL(P_R||Q_LM)", "KL(Q_LM||P_R)"] = setting(
        "KL(P_R||Q_LM)", "Which divergence is made small; KL(P_R||Q_LM) is the papers'."
    )
    score: Literal["mean_logprob", "logprob", "token_prob", "prob"] = setting(
        "mean_logprob",
        "LM score of a passage: log-prob of the answer per token, or in sum; or the exponential of one of the two: "
        "the papers' is prob, which is near 0 for long answers.",
    )
    prompt: str = setting("plain", "Template that holds question and ONE passage when the LM scores it.", min_length=1)
    include_eos: bool = setting(True, "Counts the end-of-text token as part of the answer when scoring.")
    train_part: Literal["query", "both"] = setting(
        "query", "Encoder that learns: the query side only (the index stays valid), or both (re-indexed at the end)."
    )
    in_batch_negatives: bool = setting(
        False, "Passages of the other questions of a batch are candidates too; the LM does not score them."
    )
    in_batch_floor: float = setting(
        0.01,
        "What Q_LM gives to all in-batch negatives of a question together; 0 with KL(Q_LM||P_R), whatever is set.",
        unit="probability",
        gt=0,
        lt=1,
    )
    refresh_steps: int | None = setting(
        None,
        "Every so many steps the passages are retrieved and scored anew with what was learnt so far; null: never.",
        unit="steps",
        ge=1,
    )
    keep: Literal["best", "last"] = setting(
        "best",
        "Weights that training ends with: those that did best on held-out training questions, the initial ones among "
        "them, or those of the last step.",
    )
    valid_share: float | None = setting(
        None,
        "Share of the training questions that is held out to choose the weights by, scored every train.eval_steps "
        "(null: eight times, three with train_part=both); null: 0.1 where that is at least 20 questions, else none.",
        unit="share",
        ge=0,
        lt=1,
    )
    freeze_embeddings: bool = setting(True, "Leaves the encoder's word embeddings as they are.")
    score_batch_size: int = setting(
        64, "Pairs of question and passage that the LM scores at once.", unit="pairs", ge=1
    )
    score_memory: int | None = setting(
        None,
        "Memory for one forward pass of the LM while it scores, by estimate; null: 48 on a CPU, half of what is free "
        "on a GPU.",
        unit="MiB",
        ge=1,
    )
    score_cache: str | None = setting(
        "auto",
        "Folder that keeps LM scores, so that no pair is scored twice; auto: lm_scores in output_dir; null: none.",
        min_length=1,
    )
    output_dir: str = setting("runs", "Folder that holds the run folders.", min_length=1)
    name: str | None = setting(None, "Name of the run folder; null: command and time.")
    resume: str | None = setting(None, "Run folder to go on with; its settings are taken from its config.yaml.")

    @model_validator(mode="after")
    def _checkpointing_has_no_effect(self) -> LSRConfig:
        if self.train.gradient_checkpointing:
            raise ValueError(NO_CHECKPOINTING)
        return self

    @model_validator(mode="after")
    def _fill_preset(self) -> LSRConfig:
        """A preset fills only what the user did not set."""
        for name, value in LSR_PRESETS.get(self.preset or "", {}).items():
            if name not in self.model_fields_set:
                self.__dict__[name] = value  # an assignment would run this validator again, without end
        return self
