"""The whole round on the small world, step by step; `notebooks/00_quickstart.ipynb` calls the same functions.

A real encoder, a real language model and a real index, scored on questions about entities that no training question
names; the retriever learns from the language model (LSR), the generator learns to read what is retrieved (RALT), and
two controls show that the gains come from what they should come from.
"""

from __future__ import annotations

import contextlib
import copy
import io
import random
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ragkit.config import QuickstartConfig
from ragkit.console import Out
from ragkit.engine import TrainResult
from ragkit.evaluation import Comparison, EvaluationResult, compare, evaluate
from ragkit.files import atomic_write_json
from ragkit.quickstart_graph import compare_retrievers, load_graph_step, score_retriever, tune_graph
from ragkit.rag.store import MemoryStore
from ragkit.rag.system import Answer, RAGSystem
from ragkit.runs import Run
from ragkit.tables import html_table, number, text_table
from ragkit.threads import pick_threads
from ragkit.tuning.lsr import LSRTrainer
from ragkit.tuning.lsr_table import TeacherWarning
from ragkit.tuning.qa_data import QAData, QAExample, load_qa
from ragkit.tuning.ralt import RALTTrainer
from ragkit.tuning.ralt_rows import exchange_passages
from ragkit.tuning.teacher import LSRRow
from ragkit.units import counted

CORPUS = "small_world"
KS = (1, 3, 5)
SHOWN = ("recall@1", "recall@3", "recall@5", "mrr", "em", "f1")
BEFORE, AFTER_LSR, AFTER = "before", "LSR", "LSR + RALT"
SHUFFLED, RANDOM = "shuffled teacher", "random passages"


@dataclass(repr=False)
class QuickstartResult:
    """What the round gave.

    Attributes:
        system: The tuned system.
        scores: Label ("before", "LSR", "LSR + RALT", and the controls) -> scores on the test questions.
        comparison: "LSR" and "LSR + RALT" against "before", with the intervals of the differences.
        answers: (test question, answer before, answer after) of the questions asked.
        run_dir: The run folder.
        saved: The folder of the saved system.
        seconds: How long each step took.
        two_hop: The tuned dense retriever beside the graph retriever on two-hop test questions.
    """

    system: RAGSystem
    scores: dict[str, EvaluationResult]
    comparison: Comparison
    answers: list[tuple[QAExample, Answer, Answer]]
    run_dir: Path
    saved: Path
    seconds: dict[str, float] = field(default_factory=dict)
    two_hop: Comparison | None = None

    def __repr__(self) -> str:
        return score_table(self.scores)

    def _repr_html_(self) -> str:
        rows, note = _score_rows(self.scores)
        return html_table(rows, note)


# ---- the steps, one function each ----


def load_questions(config: QuickstartConfig) -> tuple[QAData, QAData]:
    """(training questions, test questions): one-hop questions of the small world, drawn by `config.seed`.

    No entity of a training question occurs in a test question, and half of the test questions are worded as no
    training question is.
    """
    return (
        _one_hop(load_qa(CORPUS, split="train"), config.n_train, config.seed),
        _one_hop(load_qa(CORPUS, split="test"), config.n_test, config.seed),
    )


def _one_hop(data: QAData, count: int, seed: int) -> QAData:
    examples = [example for example in data if example.metadata.get("hops", 1) == 1]
    drawn = random.Random(seed).sample(examples, min(count, len(examples)))
    return QAData(drawn, data.source, data.skipped)


def build(config: QuickstartConfig) -> RAGSystem:
    """The untuned system with its index over the small world."""
    return RAGSystem.from_documents(CORPUS, config.rag)


def score(system: Any, test: Sequence[QAExample], config: QuickstartConfig, **which: bool) -> EvaluationResult:
    """Scores of a system on the test questions; `retrieve=False` or `generate=False` leaves a half out."""
    return evaluate(system, test, ks=KS, bootstrap=config.bootstrap, seed=config.seed, **which)


def untuned_copy(system: RAGSystem, train_part: Literal["query", "both"] = "query") -> RAGSystem:
    """The system with a retriever that can be trained on its own, and the same generator; made before LSR.

    Args:
        system: The system, not yet tuned.
        train_part: What LSR will train, `config.lsr.train_part`. With "query" the passages' encoder and the index are
            shared, because no training touches them; with "both" the copy has its own.
    """
    retriever: Any = copy.copy(system.retriever)
    if train_part == "both":
        # Copied together: one encoder for both sides stays one.
        encoders = copy.deepcopy((retriever.query_encoder, retriever.passage_encoder))
        retriever.query_encoder, retriever.passage_encoder = encoders
        retriever.store = _memory_copy(retriever.store)
    elif not retriever.shared:  # with one encoder, LSR makes the query side a copy itself
        retriever.query_encoder = copy.deepcopy(retriever.query_encoder)
    return RAGSystem(retriever, system.generator, system.config)


def _memory_copy(store: Any) -> MemoryStore:
    """The passages and embeddings of any store in a new one in memory."""
    if isinstance(store, MemoryStore):
        return copy.deepcopy(store)  # bit for bit; `add` would normalise the embeddings once more
    passages = list(store.passages())
    embeddings = store.embeddings([passage.id for passage in passages])
    copied = MemoryStore(device=embeddings.device)
    copied.add(passages, embeddings)
    return copied


def tune_retriever(
    system: RAGSystem,
    train: QAData,
    config: QuickstartConfig,
    run: Run,
    rows: Sequence[LSRRow] | None = None,
    test: QAData | None = None,
) -> tuple[TrainResult, list[LSRRow]]:
    """LSR in place.

    Args:
        system: The system; its query encoder is trained.
        train: The training questions.
        config: The settings.
        run: The quickstart's run folder; the training gets a folder in it.
        rows: Rows that were scored before: then this is the control, in which the language model's scores are
            shuffled among the passages of each question.
        test: Questions that are scored every `lsr.train.eval_steps`; not used where that is null.

    Returns:
        (what the training gave, the scored rows).
    """
    settings = config.lsr.model_copy(deep=True)
    settings.data.corpus, settings.rag = CORPUS, system.config
    settings.output_dir, settings.name = str(run.dir), "lsr" if rows is None else "lsr-shuffled"
    settings.train.seed = config.seed
    trainer = LSRTrainer(
        system,
        train,
        settings,
        eval_data=test if settings.train.eval_steps is not None else None,
        teacher="lm" if rows is None else "shuffled",
        rows=rows,
    )
    with warnings.catch_warnings():
        if rows is not None:
            warnings.simplefilter("ignore", TeacherWarning)  # a control is meant to say nothing
        result = trainer.train()
    return result, trainer.rows()


def tune_generator(
    system: RAGSystem, train: QAData, config: QuickstartConfig, run: Run, test: QAData | None = None
) -> TrainResult:
    """RALT in place, on the passages that the (tuned) retriever finds.

    `test` are questions whose loss is logged every `ralt.train.eval_steps`; not used where that is null.
    """
    settings = config.ralt.model_copy(deep=True)
    settings.data.corpus, settings.rag = CORPUS, system.config
    settings.output_dir, settings.name = str(run.dir), "ralt"
    settings.train.seed = config.seed
    evaluated = test if settings.train.eval_steps is not None else None
    return RALTTrainer(system, train, settings, eval_data=evaluated).train()


@dataclass(frozen=True)
class _Given:
    """A system whose passages are given: what the generator makes of passages that answer other questions."""

    system: RAGSystem
    passages: list[list[Any]]

    @property
    def config(self) -> Any:
        return self.system.config

    def batch_retrieve(self, questions: Sequence[str], top_k: int | None = None) -> list[list[Any]]:
        return self.passages

    def batch_generate(self, questions: Sequence[str], passages: Sequence[Sequence[Any]]) -> list[str]:
        return self.system.batch_generate(questions, passages)


def score_with_random_passages(
    system: RAGSystem, test: Sequence[QAExample], config: QuickstartConfig
) -> EvaluationResult:
    """The control of RALT: answers from passages that were retrieved for other questions."""
    found = system.batch_retrieve([example.question for example in test])
    return score(_Given(system, exchange_passages(test, found, config.seed)), test, config, retrieve=False)


def score_table(scores: dict[str, EvaluationResult]) -> str:
    """Before, after and controls in one table, with the 95 % intervals of after minus before."""
    rows, note = _score_rows(scores)
    return f"{text_table(rows)}\n{note}"


def _score_rows(scores: dict[str, EvaluationResult]) -> tuple[list[list[str]], str]:
    change = compare(scores[BEFORE], scores[AFTER])
    controls = [label for label in (SHUFFLED, RANDOM) if label in scores]
    head = ["metric", BEFORE, AFTER_LSR, AFTER, "after - before [95 %]", *(f"control: {name}" for name in controls)]
    rows = [head]
    for metric in SHOWN:
        difference = change.difference[metric]
        star = " *" if difference.excludes_zero else "  "
        row = [metric, *(number(scores[label][metric]) for label in (BEFORE, AFTER_LSR, AFTER))]
        row.append(f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]{star}")
        rows.append([*row, *(number(scores[c][metric]) if metric in scores[c].values else "" for c in controls)])
    return rows, f"{len(scores[BEFORE].ids)} test questions; * the 95 % interval leaves out 0"


def answer_table(answers: Sequence[tuple[QAExample, Answer, Answer]]) -> str:
    """Questions with the answer before and after, and the first passage that was retrieved."""
    lines = []
    for example, before, after in answers:
        lines.append(f"{example.question}  (expected: {example.answer})")
        for name, answer in (("before", before), ("after", after)):
            first = answer.passages[0]
            lines.append(f"  {name:<6} {answer.text or '(nothing)':<24} first passage: {first.id} ({first.score:.2f})")
    return "\n".join(lines)


# ---- all of them ----


def quickstart(config: QuickstartConfig | None = None, out: Out = print) -> QuickstartResult:
    """Builds, scores, tunes, scores again, checks with controls, asks, saves; says what it does.

    Args:
        config: The settings; None: the defaults (about four minutes on two cores).
        out: Takes each line.
    """
    config = config or QuickstartConfig()
    run = Run.create(config, config.output_dir)
    steps = _Steps(out, total=11 if config.controls else 9)
    scores: dict[str, EvaluationResult] = {}

    with steps("Build the system: passages, index, language model") as say:
        threads = pick_threads()
        train, test = load_questions(config)
        system = build(config)
        base = untuned_copy(system, config.lsr.train_part)
        retriever: Any = system.retriever
        say(f"{len(retriever.store)} passages, {len(train)} training and {len(test)} test questions")
        encoder, lm = _parameters(retriever.query_encoder.model), _parameters(system.generator.model)
        say(f"encoder {encoder}, language model {lm}; {counted(threads, 'CPU thread')}")
    with steps("Score it on the test questions") as say:
        scores[BEFORE] = score(system, test, config)
        asked = list(test[:3])
        first_answers = system.batch_query([example.question for example in asked])
        say(_line(scores[BEFORE]))
    with steps("LSR: the retriever learns which passages help the language model") as say:
        result, rows = tune_retriever(system, train, config, run, test=test)
        say(_curve(result))
    with steps("Score again") as say:
        scores[AFTER_LSR] = score(system, test, config)
        say(_line(scores[AFTER_LSR]))
    if config.controls:
        with steps("Control: the same LSR with the teacher's scores shuffled") as say:
            tune_retriever(base, train, config, run, rows=rows, test=test)
            scores[SHUFFLED] = score(base, test, config, generate=False)
            say(f"{_line(scores[SHUFFLED])}  (must not gain)")
    with steps("RALT: the generator learns to answer from what is retrieved") as say:
        result = tune_generator(system, train, config, run, test=test)
        say(_curve(result))
    with steps("Score again") as say:
        scores[AFTER] = score(system, test, config)
        say(_line(scores[AFTER]))
    if config.controls:
        with steps("Control: the tuned generator with passages of other questions") as say:
            scores[RANDOM] = score_with_random_passages(system, test, config)
            say(f"{_line(scores[RANDOM])}  (must be near 0: it reads, it does not remember)")

    with steps("GFM: a graph model learns to find what two hops away answers a question") as say:
        graph_step = load_graph_step(config)
        result, graph_retriever = tune_graph(graph_step, config, run)
        say(f"{graph_step.graph!r}; {_curve(result)}")
        two_hop = compare_retrievers(
            score_retriever(system.retriever, graph_step, config), score_retriever(graph_retriever, graph_step, config)
        )
        for name, found in zip(two_hop.labels, two_hop.results, strict=True):
            say(f"{name:<6} {'  '.join(f'{m} {found[m]:.3f}' for m in ('recall@1', 'recall@2', 'recall@5'))}")

    scores = {label: scores[label] for label in (BEFORE, AFTER_LSR, AFTER, SHUFFLED, RANDOM) if label in scores}
    out(f"\n{score_table(scores)}\n")
    out(f"{len(graph_step.test)} two-hop test questions: the tuned dense and the graph retriever\n{two_hop}\n")
    with steps("Ask three questions") as say:
        second_answers = system.batch_query([example.question for example in asked])
        answers = list(zip(asked, first_answers, second_answers, strict=True))
        for line in answer_table(answers).splitlines():
            say(line)
    with steps("Save the tuned system") as say:
        saved = system.save(run.dir / "system")
        comparison = compare(scores[BEFORE], scores[AFTER_LSR], scores[AFTER], labels=(BEFORE, AFTER_LSR, AFTER))
        graph_retriever.save(run.dir / "graph_retriever")
        whole = {label: value.to_dict() for label, value in scores.items()}
        whole |= {
            f"two-hop: {name}": value.to_dict() for name, value in zip(two_hop.labels, two_hop.results, strict=True)
        }
        atomic_write_json(run.dir / "evaluation.json", whole)
        means = {f"{label}: {m}": value.mean for label, r in scores.items() for m, value in r.metrics.items()}
        run.write_metrics({**means, "seconds": steps.seconds})
        say(f"run folder: {run.dir}")
        say(f'ask it:     python -m ragkit query system={saved} question="{asked[0].question}"')
    out(f"\ndone in {sum(steps.seconds.values()):.0f} s")
    return QuickstartResult(system, scores, comparison, answers, run.dir, saved, steps.seconds, two_hop)


class _Steps:
    """Numbers the steps, times them, and keeps what the parts print inside their step."""

    def __init__(self, out: Out, total: int):
        self.out, self.total = out, total
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, title: str) -> Iterator[Out]:
        name = f"{len(self.seconds) + 1}/{self.total}"
        self.out(f"[{name}] {title}")
        begin = time.perf_counter()
        lines: list[str] = []
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            yield lines.append
        taken = time.perf_counter() - begin
        self.seconds[f"{name} {title}"] = taken
        *first, last = [*printed.getvalue().splitlines(), *lines]
        for line in first:
            self.out(f"        {line}")
        self.out(f"        {last}" + (f"  ({taken:.1f} s)" if taken >= 1 else ""))


def _line(result: EvaluationResult) -> str:
    return "  ".join(f"{name} {result[name]:.3f}" for name in SHOWN if name in result.values)


def _curve(result: TrainResult) -> str:
    losses = [event["loss"] for event in result.history if event.get("loss") is not None]
    part = max(1, len(losses) // 10)
    first, last = sum(losses[:part]) / part, sum(losses[-part:]) / part
    return f"{result.steps} steps, loss {first:.3f} -> {last:.3f} (means of the first and last tenth)"


def _parameters(model: Any) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M parameters"
