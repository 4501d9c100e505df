"""ragkit: fine-tune every trainable part of a RAG system, in a notebook or from the shell.

Names are imported on first use, so `import ragkit` stays fast and pulls in neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ragkit.lazy import lazy_names

__version__ = "0.1.0"

_HOME = {
    "RAGConfig": "ragkit.config",
    "LSRConfig": "ragkit.config",
    "RALTConfig": "ragkit.config",
    "TrainConfig": "ragkit.config",
    "load_config": "ragkit.config",
    "Run": "ragkit.runs",
    "RAGSystem": "ragkit.rag.system",
    "DenseRetriever": "ragkit.rag.retriever",
    "HybridRetriever": "ragkit.rag.hybrid",
    "Generator": "ragkit.rag.generator",
    "MemoryStore": "ragkit.rag.store",
    "QdrantStore": "ragkit.rag.qdrant",
    "Passage": "ragkit.rag.corpus",
    "load_corpus": "ragkit.rag.corpus",
    "PromptTemplate": "ragkit.prompts",
    "load_qa": "ragkit.tuning.qa_data",
    "LSRTrainer": "ragkit.tuning.lsr",
    "lsr_table": "ragkit.tuning.lsr_table",
    "RALTTrainer": "ragkit.tuning.ralt",
    "TrainerManager": "ragkit.tuning.manager",
    "KnowledgeGraph": "ragkit.graph.knowledge_graph",
    "GNNRetriever": "ragkit.gfm.model",
    "GFMRetriever": "ragkit.gfm.retriever",
    "GFMFinetuneConfig": "ragkit.config",
    "GFMFinetuneTrainer": "ragkit.gfm.finetune",
    "GFMPretrainConfig": "ragkit.config",
    "GFMPretrainTrainer": "ragkit.gfm.pretrain",
    "load_gfm": "ragkit.gfm.checkpoint",
    "evaluate": "ragkit.evaluation",
    "compare": "ragkit.evaluation",
}
__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    from ragkit.config import (
        GFMFinetuneConfig,
        GFMPretrainConfig,
        LSRConfig,
        RAGConfig,
        RALTConfig,
        TrainConfig,
        load_config,
    )
    from ragkit.evaluation import compare, evaluate
    from ragkit.gfm.checkpoint import load_gfm
    from ragkit.gfm.finetune import GFMFinetuneTrainer
    from ragkit.gfm.model import GNNRetriever
    from ragkit.gfm.pretrain import GFMPretrainTrainer
    from ragkit.gfm.retriever import GFMRetriever
    from ragkit.graph.knowledge_graph import KnowledgeGraph
    from ragkit.prompts import PromptTemplate
    from ragkit.rag.corpus import Passage, load_corpus
    from ragkit.rag.generator import Generator
    from ragkit.rag.hybrid import HybridRetriever
    from ragkit.rag.qdrant import QdrantStore
    from ragkit.rag.retriever import DenseRetriever
    from ragkit.rag.store import MemoryStore
    from ragkit.rag.system import RAGSystem
    from ragkit.runs import Run
    from ragkit.tuning.lsr import LSRTrainer
    from ragkit.tuning.lsr_table import lsr_table
    from ragkit.tuning.manager import TrainerManager
    from ragkit.tuning.qa_data import load_qa
    from ragkit.tuning.ralt import RALTTrainer


__getattr__, __dir__ = lazy_names(__name__, _HOME)
