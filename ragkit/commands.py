"""The commands of `python -m ragkit`: quickstart, lsr, ralt, evaluate, query, and those of `ragkit.gfm_commands`.

A command is a function of its settings; `main` reads the command line and turns what went wrong into one line.
"""

from __future__ import annotations

import difflib
import os
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragkit import __version__, processes
from ragkit.compat.gfmrag import as_config
from ragkit.config import (
    Config,
    EvaluateConfig,
    GFMEvaluateConfig,
    GFMFinetuneConfig,
    GFMPretrainConfig,
    LSRConfig,
    QueryConfig,
    QuickstartConfig,
    RALTConfig,
    help_text,
    load_config,
)
from ragkit.console import Out, explain, silence_libraries, step_lines, stop_on_interrupt
from ragkit.files import atomic_write_json
from ragkit.gfm_commands import evaluate_gfm_command, finetune_command, pretrain_command, set_threads
from ragkit.inputs import CommandError, load_questions, open_retrieval, open_system
from ragkit.resuming import begin_with, settings_of_run
from ragkit.runs import Run

if TYPE_CHECKING:
    from ragkit.evaluation import EvaluationResult
    from ragkit.rag.system import RAGSystem
    from ragkit.tuning.qa_data import QAData

DONE, FAULT, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


# ---- lsr and ralt ----


def tune(config: LSRConfig | RALTConfig, out: Out) -> int:
    """Trains one part of a system, scores it before and after, and saves the tuned system in the run folder."""
    from ragkit.tuning.lsr import LSRTrainer
    from ragkit.tuning.ralt import RALTTrainer

    resumed = begin_with(config.resume) if config.resume is not None else None
    if resumed is not None:
        config = settings_of_run(resumed, config, command_of(config))
    command = command_of(config)
    processes.join(config.rag.device)
    set_threads(config.train)
    system = open_system(config, out)
    if config.system is not None:
        config.rag = system.config.model_copy(deep=True)  # what the run works with, also when it is resumed
    out(config.to_yaml())
    train = load_questions(config.data, "train", out)
    evaluates = config.train.eval_steps is not None
    test = load_questions(config.data, "test", out, required=evaluates)
    assert train is not None
    kind: Any = LSRTrainer if command == "lsr" else RALTTrainer
    # Made before the run folder, so that what it refuses leaves none behind.
    trainer = kind(system, train, config, eval_data=test if evaluates else None, run=resumed)
    trained, total = parameter_counts(system, config)
    retriever: Any = system.retriever
    out(
        f"{len(retriever.store):,} passages, {len(train):,} training questions, "
        f"{len(test) if test is not None else 0:,} test questions; "
        f"{trained:,} of the {'encoder' if command == 'lsr' else 'generator'}'s {total:,} parameters are trained"
    )
    # LSR changes what is found, RALT what is answered: each is scored by its own half.
    scoring: dict[str, Any] = {"retrieve": command == "lsr", "generate": command == "ralt"}
    before = _score(system, test, scoring, "before", out)
    run = resumed or processes.shared_run(lambda: Run.create(config, config.output_dir, config.name))
    trainer.run = run
    out(f"{'going on' if resumed else 'training'} in {run.dir}")
    with stop_on_interrupt(run, out) as pressed, step_lines(out):
        result = trainer.train(resume=resumed is not None)
    if result.stopped:
        out(f"stopped at step {result.steps}; go on with: python -m ragkit {command} resume={run.dir}")
        return INTERRUPTED if pressed else DONE
    if not processes.is_first():
        return DONE
    out(f"{result.steps} steps in {result.metrics['seconds']:.0f} s, mean loss {result.loss:.4f}")
    saved = system.save(run.dir / "system")
    after = _score(system, test, scoring, "after", out)
    if before is not None and after is not None:
        _report(before, after, run, out)
    out(f"run folder: {run.dir}")
    out(f'use it:     python -m ragkit query system={saved} question="..."')
    return DONE


def command_of(config: Config) -> str:
    """The command whose settings these are.

    Raises:
        CommandError: They are no command's.
    """
    for name, (kind, _) in COMMANDS.items():
        if type(config) is kind:
            return name
    kinds = ", ".join(kind.__name__ for kind, _ in COMMANDS.values())
    raise CommandError(f"found settings of class {type(config).__name__}, which no command takes; expected {kinds}")


def parameter_counts(system: RAGSystem, config: LSRConfig | RALTConfig) -> tuple[int, int]:
    """(parameters that will be trained, all parameters) of the part that a command tunes; lays the adapter on."""
    from ragkit.tuning.lora import adapter_parameters, add_adapter
    from ragkit.tuning.lsr import LSRModel, trained_parameters

    if isinstance(config, LSRConfig):
        model: Any = LSRModel(system.retriever, config)
        trained = trained_parameters(model, config.freeze_embeddings)
    elif config.method == "lora":
        # A new adapter changes nothing until it is trained, and the trainer keeps one that is there.
        model = system.generator.model = add_adapter(system.generator.model, config)
        trained = adapter_parameters(model)
    else:
        model = system.generator.model
        trained = list(model.parameters())
    return sum(p.numel() for p in trained), sum(p.numel() for p in model.parameters())


def _score(
    system: RAGSystem, test: QAData | None, scoring: dict[str, Any], when: str, out: Out
) -> EvaluationResult | None:
    from ragkit.evaluation import evaluate

    if test is None:
        if when == "before":
            out("no test questions (data.test): not scored")
        return None
    out(f"scoring {len(test):,} test questions ({when})")
    return evaluate(system, test, **scoring)


def _report(before: EvaluationResult, after: EvaluationResult, run: Run, out: Out) -> None:
    from ragkit.evaluation import compare

    out(f"\n{compare(before, after)}\n")
    atomic_write_json(run.dir / "evaluation.json", {"before": before.to_dict(), "after": after.to_dict()})
    for when, result in (("before", before), ("after", after)):
        run.write_metrics({f"{when}_{name}": value.mean for name, value in result.metrics.items()})


# ---- evaluate, query, quickstart ----


def evaluate_command(config: EvaluateConfig, out: Out) -> int:
    """Prints the scores of a system on the test questions."""
    from ragkit.evaluation import evaluate
    from ragkit.threads import pick_threads

    test = load_questions(config.data, "test", out)
    assert test is not None
    pick_threads()
    system: Any = open_system(config, out) if config.generate or config.system else open_retrieval(config, out)
    out(f"{len(system.retriever.store):,} passages, {len(test):,} test questions from {test.source}")
    result = evaluate(
        system, test, ks=config.ks, generate=config.generate, bootstrap=config.bootstrap, seed=config.seed
    )
    out(f"\n{result}")
    if config.output is not None:
        out(f"\nscores of every question: {atomic_write_json(config.output, result.to_dict())}")
    return DONE


def query_command(config: QueryConfig, out: Out) -> int:
    """Answers questions and prints the passages behind each answer."""
    if not config.question:
        raise CommandError('question: there is none; write question="Who wrote Hamlet?"')
    system = open_system(config, out)
    width = 110
    retrieved = system.batch_retrieve(config.question, config.top_k)
    answers = system.batch_generate(config.question, retrieved)
    for question, answer, passages in zip(config.question, answers, retrieved, strict=True):
        out(f"\nquestion: {question}\nanswer:   {answer}")
        for rank, passage in enumerate(passages, start=1):
            text = textwrap.shorten(passage.text, width - 20, placeholder=" ...")
            out(f"  {rank}. {passage.score:6.3f}  {passage.id}\n            {text}")
    return DONE


def quickstart_command(config: QuickstartConfig, out: Out) -> int:
    """The whole round on the small world."""
    from ragkit.quickstart import quickstart

    if processes.world_size() > 1:
        raise CommandError("quickstart runs in one process; start it without torchrun")
    quickstart(config, out)
    return DONE


COMMANDS: dict[str, tuple[type[Config], Callable[[Any, Out], int]]] = {
    "quickstart": (QuickstartConfig, quickstart_command),
    "lsr": (LSRConfig, tune),
    "ralt": (RALTConfig, tune),
    "evaluate": (EvaluateConfig, evaluate_command),
    "query": (QueryConfig, query_command),
    "gfm-pretrain": (GFMPretrainConfig, pretrain_command),
    "gfm-finetune": (GFMFinetuneConfig, finetune_command),
    "gfm-evaluate": (GFMEvaluateConfig, evaluate_gfm_command),
}


def run(config: Config, out: Out = print) -> int:
    """Runs the command of these settings: what `python -m ragkit COMMAND` does, from Python.

    Args:
        config: Settings of a command, for example an `LSRConfig`; they are not changed.
        out: Takes each line that is shown.

    Returns:
        The exit status: 0, or 130 after Ctrl-C. What is wrong with the settings or the data is raised.

    Raises:
        CommandError: No command takes settings of this class.
    """
    _, command = COMMANDS[command_of(config)]
    silence_libraries()
    try:
        return command(config.model_copy(deep=True), out if processes.is_first() else _say_nothing)
    finally:
        processes.leave()


# ---- the command line ----


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: `COMMAND [config.yaml] [key=value ...]`; None: those of the process.

    Returns:
        The exit status: 0, 1 for a fault of the program (with its traceback), 2 for something wrong in what was given
        (one line; the traceback with `--traceback`), 130 after Ctrl-C.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    show_traceback = "--traceback" in given
    given = [argument for argument in given if argument != "--traceback"]
    out: Out = _print if processes.is_first() else _say_nothing
    silence_libraries()
    try:
        if not processes.is_first():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process
        return _run(given, out)
    except KeyboardInterrupt:
        out("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our lines is gone, as with `| head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - so that the flush at exit does not fail too
        return DONE
    except Exception as error:
        message = explain(error)
        if message is None or show_traceback:
            traceback.print_exc()
        elif processes.is_first():
            print(f"ragkit: {message}", file=sys.stderr)
        return FAULT if message is None else BAD_INPUT
    finally:
        processes.leave()


def _run(given: list[str], out: Out) -> int:
    if not given or given[0] in ("-h", "--help", "help"):
        out(overview())
        return DONE if given else BAD_INPUT
    if given[0] == "--version":
        out(__version__)
        return DONE
    name, *rest = given
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        hint = f'did you mean "{near[0]}"? ' if near else ""
        raise CommandError(f'unknown command "{name}"; {hint}the commands are {", ".join(COMMANDS)}')
    kind, command = COMMANDS[name]
    if {"-h", "--help"} & set(rest):
        out(help_text(kind, name))
        return DONE
    for flag in rest:
        if flag.startswith("-") and "=" not in flag:  # before the word after it is taken for a file
            load_config(kind, None, [flag])
    files = [argument for argument in rest if "=" not in argument and not argument.startswith("-")]
    if len(files) > 1:
        raise CommandError(f"found {len(files)} configuration files ({', '.join(files)}), expected one at most")
    overrides = [argument for argument in rest if argument not in files]
    foreign = as_config(kind, Path(files[0]), overrides) if files else None
    if foreign is not None:  # a file of GFM-RAG
        config, report = foreign
        out(f"{report}\n")
        return command(config, out)
    return command(load_config(kind, Path(files[0]) if files else None, overrides), out)


def overview() -> str:
    """The text of `python -m ragkit --help`."""
    lines = ["python -m ragkit COMMAND [config.yaml] [key=value ...]", "", "Commands:"]
    for name, (kind, _) in COMMANDS.items():
        lines.append(f"  {name:<12} {(kind.__doc__ or '').splitlines()[0]}")
    lines += [
        "",
        "python -m ragkit COMMAND --help  lists every setting of a command",
        "--traceback                      shows where an error arose",
        "torchrun --nproc-per-node 2 -m ragkit lsr ...  trains on two devices",
        "",
        "Example, with your own data:",
        "  python -m ragkit lsr data.corpus=corpus.jsonl data.train=train.jsonl data.test=test.jsonl",
    ]
    return "\n".join(lines)


def _print(line: str) -> None:
    print(line, flush=True)


def _say_nothing(line: str) -> None:
    pass
