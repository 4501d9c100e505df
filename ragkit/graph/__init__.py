"""The knowledge graph: triples, the documents behind them, and the files that hold both."""

from __future__ import annotations

from ragkit.graph.knowledge_graph import KnowledgeGraph
from ragkit.graph.normalise import normalise
from ragkit.graph.report import GraphError, LoadReport

__all__ = ["GraphError", "KnowledgeGraph", "LoadReport", "normalise"]
