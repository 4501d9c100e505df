"""The commands of the graph foundation model: gfm-pretrain, gfm-finetune and gfm-evaluate."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from ragkit import processes
from ragkit.config import GFMEvaluateConfig, GFMFinetuneConfig, GFMPretrainConfig, TrainConfig
from ragkit.console import Out, step_lines, stop_on_interrupt
from ragkit.files import atomic_write_json
from ragkit.inputs import CommandError
from ragkit.resuming import begin_with, settings_of_run
from ragkit.runs import Run

if TYPE_CHECKING:
    from ragkit.evaluation import EvaluationResult
    from ragkit.gfm.training import GFMTraining
    from ragkit.graph import KnowledgeGraph

DONE, INTERRUPTED = 0, 130
# What the table after a training shows; all others (all@k, filtered hits@k) are in the run's evaluation.json.
MAIN = ("doc_recall@", "doc_mrr", "ent_recall@", "ent_mrr", "mrr", "mr", "hits@")


def set_threads(train: TrainConfig | Any) -> None:
    """Sets PyTorch's threads to `train.num_threads`; where that is null the fastest number is measured and kept there.

    The number goes into the run's config.yaml, because a resumed run repeats the numbers of an unbroken one bit for
    bit only with as many threads.
    """
    import torch

    from ragkit.threads import pick_threads

    if train.num_threads is None:
        train.num_threads = pick_threads()
    torch.set_num_threads(train.num_threads)


def finetune_command(config: GFMFinetuneConfig, out: Out) -> int:
    """Fine-tunes a graph foundation model, scores it before and after, and saves it in the run folder."""
    from ragkit.gfm.finetune import GFMFinetuneTrainer

    config, resumed = _begin(config, "gfm-finetune", out)
    trainer = GFMFinetuneTrainer(config, run=resumed)
    data = trainer.data
    for name, part in data.train.items():
        out(f"{name}: {_sizes(part.graph)}, {len(part.questions):,} training questions")
    for what, sets in (("validation", data.valid), ("test", data.test)):
        if sets:
            out(f"{what}: " + ", ".join(f"{len(part.questions):,} of {name}" for name, part in sets.items()))
    if not data.valid:
        out("no validation questions: the last weights are kept, not the best")
    out(_parameters(trainer))
    count = sum(len(part.questions) for part in data.test.values())
    return _train(trainer, "gfm-finetune", resumed, f"{count:,} test questions" if count else "", out)


def pretrain_command(config: GFMPretrainConfig, out: Out) -> int:
    """Pre-trains a graph foundation model, scores it on held-out facts, and saves it in the run folder."""
    from ragkit.gfm.pretrain import GFMPretrainTrainer

    config, resumed = _begin(config, "gfm-pretrain", out)
    trainer = GFMPretrainTrainer(config, run=resumed)
    for name, part in trainer.data.items():
        # The graph is the one without the held-out triples.
        held = f"{len(part.valid):,} more are held out to score" if len(part.valid) else "none is held out"
        out(f"{name}: {_sizes(part.graph)}; {held}")
    if not trainer.valid_names:
        out("no held-out triples: nothing is scored, and the last weights are kept, not the best")
    out(_parameters(trainer))
    count = sum(len(part.valid) for part in trainer.data.values())
    return _train(trainer, "gfm-pretrain", resumed, f"{count:,} held-out triples" if count else "", out)


def evaluate_gfm_command(config: GFMEvaluateConfig, out: Out) -> int:
    """Prints the scores of a model on the test questions of each data set, ranker by ranker."""
    from ragkit.evaluation import compare
    from ragkit.gfm.checkpoint import load_gfm
    from ragkit.gfm.datasets import DatasetError, find_dataset, load_graphs, short_names
    from ragkit.gfm.evaluate import evaluate_rankers, named_ranker
    from ragkit.gfm.linking import make_linker, relinked
    from ragkit.gfm.questions import QuestionSet
    from ragkit.gfm.text_encoder import open_encoder
    from ragkit.rag.loading import resolve_device
    from ragkit.threads import pick_threads

    if config.checkpoint is None:
        raise CommandError("checkpoint: there is none; write checkpoint=runs/NAME/model, or a hub repository")
    model = load_gfm(config.checkpoint, kind="retriever").to(resolve_device(config.device)).eval()
    if getattr(model, "new_parameters", None):
        raise CommandError(
            f"checkpoint: {config.checkpoint} is pre-trained only, and has nothing yet that reads a question; "
            f"fine-tune it first: python -m ragkit gfm-finetune train.checkpoint={config.checkpoint} "
            "datasets.train_names=[...]"
        )
    out(config.to_yaml())
    pick_threads()
    encoder = open_encoder(config.text_emb_model, config.device)
    datasets = config.datasets
    names = datasets.train_names if datasets.test_names is None else datasets.test_names
    graphs = load_graphs(names, datasets, encoder)
    found: dict[str, Any] = {}
    for short, name in zip(short_names(names), names, strict=True):
        graph = graphs[short]
        folder = find_dataset(name, datasets.root)
        questions = QuestionSet.load(
            folder, graph, encoder, datasets.test_split, v1_names=datasets.v1_names, cache=datasets.cache
        )
        whole = [i for i in range(len(questions)) if not questions.is_part[i]][: datasets.max_test]
        if not whole:
            raise DatasetError(f"{name}: all {len(questions)} questions are marked sub_question")
        used = questions.subset(whole)
        if datasets.link != "given":
            linker = make_linker(datasets.link, graph, encoder, datasets.top_facts, datasets.cache)
            used = relinked(used, linker)
        out(f"\n{short}: {_sizes(graph)}, {len(whole):,} questions")
        results = evaluate_rankers(
            model,
            graph,
            used,
            {ranker: named_ranker(ranker, None) for ranker in config.rankers},
            ks=config.ks,
            batch_size=config.batch_size,
            init_entities_weight=config.init_entities_weight,
            bootstrap=config.bootstrap,
            seed=config.seed,
        )
        documents = [_part_of(result, "doc_") for result in results.values()]
        out(f"{compare(*documents, labels=list(results)) if len(documents) > 1 else documents[0]}")
        # No ranker changes the entities' scores: those of the first are those of all.
        entities = _part_of(next(iter(results.values())), "ent_recall@", "ent_mrr", "ent_filtered")
        out(f"\nentities, the same for every ranker\n{entities}")
        found[short] = {ranker: result.to_dict() for ranker, result in results.items()}
    if config.output is not None:
        out(f"\nscores of every question: {atomic_write_json(config.output, found)}")
    return DONE


def _begin(config: Any, command: str, out: Out) -> tuple[Any, Run | None]:
    """Settings (those of the run that is resumed), processes and threads."""
    resumed = begin_with(config.resume) if config.resume is not None else None
    if resumed is not None:
        config = settings_of_run(resumed, config, command)
    processes.join(config.device)
    set_threads(config.train)
    out(config.to_yaml())
    return config, resumed


def _train(trainer: GFMTraining[Any, Any], command: str, resumed: Run | None, scored: str, out: Out) -> int:
    """Scores, trains, scores again and says where everything is.

    Args:
        trainer: The training.
        command: The command's name.
        resumed: The run that is gone on with.
        scored: What is scored before and after, in words; empty: nothing.
        out: Takes the lines.
    """
    from ragkit.evaluation import compare
    from ragkit.gfm.training import MODEL, best_of

    config = trainer.config
    if scored:
        out(f"scoring {scored} (before)")
    before = trainer.test()
    run = resumed or processes.shared_run(lambda: Run.create(config, config.output_dir, config.name))
    trainer.run = run
    out(f"{'going on' if resumed else 'training'} in {run.dir}")
    with stop_on_interrupt(run, out) as pressed, step_lines(out):
        result = trainer.train(resume=resumed is not None)
    if result.stopped:
        out(f"stopped at step {result.steps}; go on with: python -m ragkit {command} resume={run.dir}")
        return INTERRUPTED if pressed else DONE
    if scored:
        out(f"scoring {scored} (after)")
    after = trainer.test()
    if not processes.is_first():
        return DONE
    out(f"{result.steps} steps in {result.metrics['seconds']:.0f} s, mean loss {result.loss:.4f}")
    best = best_of(run)
    if best is not None:
        out(f"best {best['metric']} {best['value']:.4f} at step {best['step']}: these weights are kept")
    for name, scores in after.items():
        shown = [
            _part_of(part, *MAIN, config.train.watched_metric.rpartition("/")[2]) for part in (before[name], scores)
        ]
        out(f"\n{name}\n{compare(*shown)}")
        for when, part in (("before", before[name]), ("after", scores)):
            run.write_metrics({f"{when}/{name}/{metric}": value.mean for metric, value in part.metrics.items()})
    if after:
        whole = {name: {"before": before[name].to_dict(), "after": after[name].to_dict()} for name in after}
        path = atomic_write_json(run.dir / "evaluation.json", whole)
        out(f"\nall metrics, question by question: {path}")
    out(f"run folder: {run.dir}")
    saved = run.dir / MODEL
    if command == "gfm-pretrain":
        out(f"use it:     python -m ragkit gfm-finetune train.checkpoint={saved} datasets.train_names=[...]")
    else:
        out(f"use it:     python -m ragkit gfm-evaluate checkpoint={saved} datasets.test_names=[...]")
    return DONE


def _part_of(result: EvaluationResult, *starts: str) -> EvaluationResult:
    """The metrics of a result whose names begin with one of these."""
    kept = {name: values for name, values in result.values.items() if name.startswith(starts)}
    return dataclasses.replace(result, values=kept)


def _sizes(graph: KnowledgeGraph) -> str:
    text = f"{graph.num_entities:,} entities, {graph.num_relations:,} relations, {graph.num_triples:,} triples"
    return f"{text}, {graph.num_documents:,} documents" if graph.num_documents else text


def _parameters(trainer: GFMTraining[Any, Any]) -> str:
    settings = trainer.model.settings
    count = sum(p.numel() for p in trainer.model.parameters())
    return (
        f"model: {settings.num_layers} layers of {settings.input_dim}, {count:,} parameters, on {trainer.model.device}"
    )
