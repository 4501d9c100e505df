"""Documents to answers: corpus, store, retriever, generator and the system that joins them."""

from __future__ import annotations

from ragkit.rag.corpus import CorpusError, Passage, RetrievedPassage, load_corpus
from ragkit.rag.generator import Generator, TokenizerError
from ragkit.rag.hybrid import HybridRetriever
from ragkit.rag.qdrant import QdrantStore
from ragkit.rag.retriever import DenseRetriever, Retriever, TrainableRetriever
from ragkit.rag.store import KnowledgeStore, MemoryStore, StoreError
from ragkit.rag.system import Answer, RAGSystem

__all__ = [
    "Answer",
    "CorpusError",
    "DenseRetriever",
    "Generator",
    "HybridRetriever",
    "KnowledgeStore",
    "MemoryStore",
    "Passage",
    "QdrantStore",
    "RAGSystem",
    "RetrievedPassage",
    "Retriever",
    "StoreError",
    "TokenizerError",
    "TrainableRetriever",
    "load_corpus",
]
