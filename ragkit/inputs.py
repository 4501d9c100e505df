"""What a command works on: the questions and the system that its settings name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragkit.config import DataConfig, EvaluateConfig, RAGConfig
from ragkit.console import Out

if TYPE_CHECKING:
    from ragkit.rag.retriever import Retriever
    from ragkit.rag.system import RAGSystem
    from ragkit.tuning.qa_data import QAData


class CommandError(ValueError):
    """A command that cannot be run as it was given."""


def load_questions(data: DataConfig, split: str, out: Out = print, required: bool = True) -> QAData | None:
    """The training or test questions that the settings name.

    Args:
        data: `data.train` or `data.test` is a file, or the name of a split of the corpus; None: the corpus's own.
        split: "train" or "test". Rows marked `sub_question` (MuSiQue's single-hop parts) are left out of a test, and
            a line says so, because published scores are over whole questions; training keeps them.
        out: Takes the line.
        required: Whether it is an error if the settings name none and the corpus has none.

    Returns:
        The questions; of more than `data.max_train` or `data.max_test` a sample, the same in every run. None if
        there are none and none are required.

    Raises:
        CommandError: There is no such corpus, or there are no questions, but the command needs some.
        DataError: A file cannot be read.
    """
    from ragkit.tuning.qa_data import QAData, load_qa

    if data.corpus != "small_world" and not Path(data.corpus).exists():
        raise CommandError(f'data.corpus: there is no file or folder "{data.corpus}"')
    wanted, most = (data.train, data.max_train) if split == "train" else (data.test, data.max_test)
    corpus = Path(data.corpus)
    folder = data.corpus if data.corpus == "small_world" or corpus.is_dir() else None
    if corpus.name == "dataset_corpus.json":
        folder = str(corpus.parent)
    is_file = wanted is not None and (Path(wanted).exists() or Path(wanted).suffix in (".json", ".jsonl"))
    if wanted is None and not _has_split(folder, split):
        if not required:
            return None
        raise CommandError(f"there are no {split} questions in {data.corpus}; name a file: data.{split}=FILE.jsonl")
    if is_file:
        questions = load_qa(str(wanted), columns=data.columns or None)
    elif folder is None:
        raise CommandError(f'data.{split}: there is no file "{wanted}", and {data.corpus} has no splits')
    else:
        questions = load_qa(folder, columns=data.columns or None, split=wanted or split)
    kept = [example for example in questions if split == "train" or not example.metadata.get("sub_question")]
    if len(kept) < len(questions):
        out(f"left out of the test: {len(questions) - len(kept)} rows marked sub_question (whole questions only)")
    if not kept:
        raise CommandError(f"{questions.source}: all {len(questions)} questions are marked sub_question")
    return QAData(kept, questions.source, questions.skipped).sample(most)


def _has_split(folder: str | None, split: str) -> bool:
    if folder is None or folder == "small_world":
        return folder is not None
    return any((Path(folder) / part / f"{split}.json").is_file() for part in ("raw", "."))


def open_system(config: Any, out: Out) -> RAGSystem:
    """The saved system that `config.system` names, or a new one from `config.data` and `config.rag`.

    A saved system brings its own settings; `rag.device` and `rag.top_k` take their place where they are given.

    Raises:
        CommandError: There is no such folder, or another `rag` setting was given that differs from the saved one and
            so would have no effect.
    """
    from ragkit.rag.system import RAGSystem

    if config.system is not None:
        if not Path(config.system).is_dir():
            raise CommandError(f'system: there is no folder "{config.system}"')
        out(f"loading the system {config.system}")
        given = config.rag.explicit()
        device, top_k = given.pop("device", None), given.pop("top_k", None)
        path = Path(config.system) / "config.yaml"
        if path.is_file():  # else the load says what is missing
            saved = RAGConfig.from_yaml(path)
            lost = [name for name, value in given.items() if value != getattr(saved, name)]
            if lost:
                raise CommandError(
                    f"{', '.join(f'rag.{name}' for name in lost)}: no effect with system={config.system}, which was "
                    f"saved with rag.{lost[0]}={getattr(saved, lost[0])!r}; leave out what differs (only rag.device "
                    "and rag.top_k can be changed), or build a new system without system="
                )
        system = RAGSystem.load(config.system, device=device)
        if top_k is not None:
            system.config.top_k = top_k
        return system
    out(f"building the system on {config.data.corpus}")
    return RAGSystem.from_documents(config.data.corpus, config.rag)


class Retrieval:
    """A system that only retrieves: scoring retrieval must not load a language model."""

    def __init__(self, retriever: Retriever):
        self.retriever = retriever

    def batch_retrieve(self, questions: Sequence[str], top_k: int) -> list[Any]:
        """The best passages for each question."""
        return self.retriever.retrieve(questions, top_k)


def open_retrieval(config: EvaluateConfig, out: Out) -> Retrieval:
    """The retriever of `config.data` and `config.rag`, with its index.

    Raises:
        StoreError: A Qdrant collection holds other passages already.
    """
    from ragkit.rag.corpus import load_corpus
    from ragkit.rag.system import index_corpus, make_retriever

    out(f"indexing {config.data.corpus}")
    passages = load_corpus(config.data.corpus)
    retriever = make_retriever(config.rag)
    index_corpus(retriever, passages)
    return Retrieval(retriever)
