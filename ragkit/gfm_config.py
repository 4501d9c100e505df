"""The settings of the GFM's runs under the names that GFM-RAG v1 gives them, so that its overrides work as they stand.

`ragkit.config` gives these classes out beside all others. What v1 has and we do not is said by `ragkit.compat.gfmrag`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ragkit.settings import Config, group, setting

Positive = Annotated[int, Field(ge=1)]


class GFMDatasets(Config):
    """The data sets of a GFM run: folders in the layout of GFM-RAG v1 or v2, or "small_world" (shipped)."""

    root: str = setting("./data", "Folder that holds the data sets.", min_length=1)
    train_names: list[str] = setting(
        ["small_world"], "Data sets that are trained on: names under root, or folders.", min_length=1
    )
    valid_names: list[str] = setting(
        [],
        "Data sets whose questions choose the best model (not your test sets); empty: valid_share of train_names.",
    )
    valid_share: float = setting(
        0.1,
        "Share of each training set that is held out to choose the best model, where valid_names is empty.",
        unit="share",
        ge=0,
        le=0.5,
    )
    test_names: list[str] | None = setting(
        None, "Data sets scored before and after; null: those of train_names that have a test split; []: none."
    )
    link: Literal["given", "names", "facts"] = setting(
        "given",
        "A question's entities: those of the data set, those that ragkit's linker finds in it (the data set's where "
        "it finds none), or these with the entities of the facts nearest to it.",
    )
    top_facts: int = setting(3, "Facts for each question, with link=facts.", unit="facts", ge=1)
    train_split: str = setting("train", "File of a data set's training questions.", min_length=1)
    valid_split: str = setting("test", "File of the questions of valid_names.", min_length=1)
    test_split: str = setting("test", "File of the questions of test_names.", min_length=1)
    max_train: int | None = setting(
        None,
        "Uses a sample of so many training questions of a data set, the same in every run.",
        unit="questions",
        ge=1,
    )
    sub_questions: bool = setting(
        True, "Trains on rows marked sub_question too (MuSiQue's single-hop parts); they are never scored."
    )
    max_test: int | None = setting(
        None, "Uses a sample of so many questions of a test set, the same in every run.", unit="questions", ge=1
    )
    cache: bool = setting(True, "Keeps graphs, layouts and embeddings on disk, under keys made of their content.")
    v1_names: bool = setting(False, "Brings names to GFM-RAG v1's normal form first.")


class TextEmbModel(Config):
    """The text encoder of questions and relations; a checkpoint needs the one that it was trained with."""

    text_emb_model_name: str = setting(
        "default",
        'sentence-transformers model: hub name or folder; "default" is the installed MiniLM (384 numbers a text).',
        min_length=1,
    )
    query_instruct: str = setting("", "Text put before every question.")
    passage_instruct: str = setting("", "Text put before every relation.")
    batch_size: int = setting(64, "Texts encoded at once.", unit="texts", ge=1)
    max_tokens: int | None = setting(None, "Longer texts are cut; null: the encoder's own limit.", unit="tokens", ge=1)


class EntityModelConfig(Config):
    """Sizes and kinds of the message passing layers."""

    input_dim: int = setting(512, "Numbers in the state of an entity.", unit="dimensions", ge=1)
    hidden_dims: list[Positive] = setting(
        [512] * 6, "Numbers that each layer puts out; as many as there are layers.", unit="dimensions", min_length=1
    )
    message_func: Literal["distmult", "transe"] = setting(
        "distmult", "What an edge carries: the state of its start times its relation (distmult), or plus it (transe)."
    )
    aggregate_func: Literal["sum", "mean", "max", "pna"] = setting(
        "sum", "How an entity joins what its edges carry; pna: mean, least, largest and spread, in three scales."
    )
    short_cut: bool = setting(True, "Adds a layer's input to its output.")
    layer_norm: bool = setting(True, "LayerNorm before the activation.")
    concat_hidden: bool = setting(False, "The head reads the states of all layers, not of the last alone.")
    num_mlp_layer: int = setting(2, "Linear maps in the head.", unit="layers", ge=1)


class GFMModelConfig(Config):
    """The model that is trained from scratch; a checkpoint brings its own sizes."""

    entity_model: EntityModelConfig = group(EntityModelConfig(), "the message passing layers")


class OptimizerConfig(Config):
    """AdamW."""

    lr: float = setting(5e-4, "Peak learning rate.", unit="weight change per step", gt=0, le=10)
    weight_decay: float = setting(
        0.01,
        "Decoupled weight decay: at each step weights shrink by this times the learning rate.",
        unit="share per unit of rate",
        ge=0,
        le=1,
    )


class LossConfig(Config):
    """One term of the fine-tuning loss."""

    name: Literal["bce", "listce"] = setting("listce", "Binary, or list-wise cross-entropy.")
    weight: float = setting(1.0, "Factor of this term.", unit="factor", ge=0)
    adversarial_temperature: float = setting(
        0.2, "bce: negatives are weighted by softmax(logit / this); 0: equally.", unit="logits", ge=0
    )
    is_doc_loss: bool = setting(False, "On documents instead of entities.")
    doc_score: Literal["score_weighted_idf", "simple"] | None = setting(
        None,
        "Document score of a document loss: Σ sigmoid(logit) / df (null, listce), or v1's Σ logit (null, bce).",
    )

    @model_validator(mode="after")
    def _fits(self) -> LossConfig:
        if self.name == "bce" and self.is_doc_loss and self.doc_score == "score_weighted_idf":
            raise ValueError("a bce loss on documents takes logits, doc_score: simple")
        return self


class RankerConfig(Config):
    """How documents are ranked by the scores of their entities."""

    name: Literal["simple", "idf", "topk", "idf_topk", "score_weighted_idf"] = setting(
        "idf_topk",
        "How the scores of its entities make a document's: simple adds them up, idf divides each by the documents "
        "that the entity is in, topk counts those among the best, idf_topk (GFM-RAG's) is both, score_weighted_idf "
        "keeps how sure the model is.",
    )
    top_k: int | None = setting(
        None, "Best entities that count; null: the ranker's own (10, 20, or all).", unit="entities", ge=1
    )


class GFMTrainConfig(Config):
    """How a GFM training runs."""

    batch_size: int = setting(8, "Questions or triples in one step on one device.", unit="examples", ge=1)
    num_epoch: float = setting(20, "How often every data set is gone through.", unit="epochs", gt=0)
    batch_per_epoch: int | None = setting(
        None, "At most so many batches of each data set in an epoch; null: all of it.", unit="batches", ge=1
    )
    max_steps: int | None = setting(
        None, "Ends training after this many optimizer steps; overrides num_epoch.", unit="steps", ge=1
    )
    log_interval: int = setting(1, "An event is written every so many steps.", unit="steps", ge=1)
    do_eval: bool = setting(True, "Scores the validation questions after every epoch, or every eval_steps.")
    eval_steps: int | None = setting(None, "Steps between two evaluations; null: once an epoch.", unit="steps", ge=1)
    eval_batch_size: int | None = setting(
        None, "Questions or triples scored at once; null: batch_size.", unit="examples", ge=1
    )
    watched_metric: str = setting(
        "doc_recall@5", "The metric that chooses the best model: its mean over the validation sets.", min_length=1
    )
    checkpoint: str | None = setting(
        None, "Weights to start from: folder or hub repository (GFM-RAG's or ours); null: from scratch."
    )
    init_entities_weight: bool = setting(
        True, "A question's entities start with 1 / (number of their documents) instead of 1."
    )
    save_steps: int | None = setting(
        None, "Steps between two checkpoints to resume from; null: once an epoch.", unit="steps", ge=1
    )
    save_total_limit: int = setting(2, "How many checkpoints are kept.", unit="checkpoints", ge=1)
    precision: Literal["fp32", "bf16", "fp16"] = setting(
        "fp32", "Number format of the forward and backward pass; fp16 needs a GPU."
    )
    gradient_accumulation_steps: int = setting(
        1, "Batches whose gradients are added up before one optimizer step.", unit="batches", ge=1
    )
    gradient_checkpointing: bool = setting(
        False, "Recomputes each layer in the backward pass: less memory, about a third slower."
    )
    max_grad_norm: float = setting(
        1.0, "Gradients are scaled down to this L2 norm at most; 0 turns clipping off.", unit="gradient norm", ge=0
    )
    warmup_steps: int | float = setting(
        0, "Steps over which the rate rises to its peak; below 1: that share of all.", unit="steps", ge=0
    )
    schedule: Literal["linear", "cosine", "constant"] = setting(
        "constant",
        "After the warm-up the learning rate goes down to 0 in a line (linear) or a wave (cosine), or not (constant).",
    )
    num_threads: int | None = setting(
        None, "CPU threads of PyTorch; null: as PyTorch is set already.", unit="threads", ge=1, le=1024
    )
    report_to: list[str] = setting([], 'Loggers of transformers to report to, for example ["wandb"].')


class GFMFinetuneTask(Config):
    """What fine-tuning asks of the model."""

    losses: list[LossConfig] = setting(
        [LossConfig(name="bce", weight=0.3), LossConfig(name="listce", weight=0.7)],
        "Terms of the loss (lines of name, weight, adversarial_temperature, is_doc_loss, doc_score).",
        min_length=1,
    )
    ks: list[Positive] = setting(
        [1, 2, 5, 10, 20], "Cut-offs k of recall@k, all@k and hits@k.", unit="places", min_length=1
    )


class GFMPretrainTask(Config):
    """What pre-training asks of the model: which tail belongs to (head, relation, ?)."""

    num_negative: int = setting(256, "Wrong answers beside each right one.", unit="entities", ge=1)
    strict_negative: bool = setting(True, "No wrong answer is a fact of the graph.")
    adversarial_temperature: float = setting(
        1.0, "Negatives are weighted by softmax(logit / this); 0: equally.", unit="logits", ge=0
    )
    remove_easy_edges: bool = setting(True, "Hides the asked facts from the message passing while training.")
    valid_share: float = setting(
        0.05, "Share of each graph's triples that is held out and scored.", unit="share", ge=0, le=0.5
    )
    max_valid: int | None = setting(
        500, "At most so many held-out triples of a graph are scored (v1: fast_test).", unit="triples", ge=1
    )
    ks: list[Positive] = setting([1, 3, 10], "Cut-offs k of hits@k.", unit="places", min_length=1)


class GFMRunConfig(Config):
    """What both trainings share."""

    seed: int = setting(
        1024, "Seed of new weights, data order, negatives and splits.", unit="seed number", ge=0, lt=2**32
    )
    datasets: GFMDatasets = group(GFMDatasets(), "the data sets that are trained on and scored")
    text_emb_model: TextEmbModel = group(TextEmbModel(), "the text encoder")
    model: GFMModelConfig = group(GFMModelConfig(), "the model, where there is no train.checkpoint")
    optimizer: OptimizerConfig = group(OptimizerConfig(), "the optimizer, AdamW")
    device: str = setting(
        "auto",
        '"auto" (GPU if there is one), "cpu", "cuda", "cuda:1" or "mps".',
        pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
        form="auto, cpu, mps, cuda or cuda:N",
    )
    output_dir: str = setting("runs", "Folder that holds the run folders.", min_length=1)
    name: str | None = setting(None, "Name of the run folder; null: command and time.")
    resume: str | None = setting(None, "Run folder to go on with; its settings are taken from its config.yaml.")
    train: GFMTrainConfig = group(GFMTrainConfig(), "batches, epochs, checkpoints")


class GFMFinetuneConfig(GFMRunConfig):
    """Fine-tunes a graph foundation model on questions and their supporting documents."""

    task: GFMFinetuneTask = group(GFMFinetuneTask(), "losses and metrics")
    doc_ranker: RankerConfig = group(RankerConfig(), "the ranker of documents in evaluations")


class GFMPretrainConfig(GFMRunConfig):
    """Pre-trains a graph foundation model by link prediction on knowledge graphs."""

    task: GFMPretrainTask = group(GFMPretrainTask(), "negatives and metrics")
    train: GFMTrainConfig = group(GFMTrainConfig(num_epoch=10, watched_metric="mrr"), "batches, epochs, checkpoints")


class GFMEvaluateConfig(Config):
    """Scores a graph foundation model: true recall@k, all@k, MRR and v1's filtered hits@k, with 95 % intervals."""

    checkpoint: str | None = setting(None, "The model: folder or hub repository (GFM-RAG's or ours).")
    datasets: GFMDatasets = group(GFMDatasets(), "the data; test_names (null: train_names) and test_split count here")
    text_emb_model: TextEmbModel = group(TextEmbModel(), "the text encoder")
    rankers: list[Literal["simple", "idf", "topk", "idf_topk", "score_weighted_idf"]] = setting(
        ["idf_topk", "score_weighted_idf"], "Rankers of documents that are compared.", min_length=1
    )
    init_entities_weight: bool = setting(
        True, "A question's entities start with 1 / (number of their documents) instead of 1."
    )
    ks: list[Positive] = setting(
        [1, 2, 5, 10, 20], "Cut-offs k of recall@k, all@k and hits@k.", unit="places", min_length=1
    )
    batch_size: int = setting(8, "Questions scored at once.", unit="questions", ge=1)
    device: str = setting(
        "auto",
        '"auto" (GPU if there is one), "cpu", "cuda", "cuda:1" or "mps".',
        pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
        form="auto, cpu, mps, cuda or cuda:N",
    )
    bootstrap: int = setting(2000, "Resamples behind the intervals.", unit="resamples", ge=100, le=1_000_000)
    seed: int = setting(0, "Seed of the resampling.", unit="seed number", ge=0, lt=2**32)
    output: str | None = setting(None, "JSON file for the scores of every question; null: only printed.")
