"""FedRAG names that are not here, each with what to use instead; and arguments that nothing takes."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

_ASYNC = "await asyncio.to_thread(rag_system.query, question) asks without blocking the event loop"
_BENCHMARK = "ragkit.evaluate(rag_system.core, questions) scores recall, EM and F1 with intervals"

# name: what to use. Those that FedRAG's own pages import.
NOT_HERE = {
    "AsyncRAGSystem": f"use RAGSystem; {_ASYNC}",
    "NoEncodeRAGSystem": "every store here is searched by embeddings; use RAGSystem",
    "AsyncNoEncodeRAGSystem": f"every store here is searched by embeddings; use RAGSystem; {_ASYNC}",
    "AsyncQdrantKnowledgeStore": f"use QdrantKnowledgeStore; {_ASYNC}",
    "ManagedInMemoryKnowledgeStore": 'use InMemoryKnowledgeStore(name="a-name-for-each-version")',
    "MCPKnowledgeStore": "passages from tools are not read; load them into an InMemoryKnowledgeStore",
    "HFMultimodalModelGenerator": "text only; use HFPretrainedModelGenerator",
    "UnslothFastModelGenerator": "use HFPretrainedModelGenerator; RALTConfig(method='lora') makes the adapter",
    "PyTorchRAGTrainerManager": "use HuggingFaceRAGTrainerManager: its trainers train any torch model of the system",
    "federate": "a trainer needs no decorator here; use manager.get_federated_task()",
    "build_finetune_dataset": "HuggingFaceTrainerForRALT(rag_system, examples).rows() are the training instances",
    "PyTorchFLTask": "use manager.get_federated_task()",
    "Benchmarker": _BENCHMARK,
    "ExactMatchEvaluationMetric": f"ragkit.evaluation.exact_match(text, answers) is the metric; {_BENCHMARK}",
}


def refuse_unknown(
    owner: str, unknown: Mapping[str, Any], known: Sequence[str], places: Mapping[str, str] | None = None
) -> None:
    """An error for the first argument that `owner` does not take, with the name or place that was likely meant.

    Args:
        owner: Whose arguments these are.
        unknown: What is left over of the given keyword arguments.
        known: The arguments that there are.
        places: For names that belong elsewhere: what to write.

    Raises:
        TypeError: There is one.
    """
    for name, value in unknown.items():
        near = difflib.get_close_matches(name, known, n=1)
        hint = (places or {}).get(name) or (f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known)}")
        raise TypeError(f"{owner}: unknown argument {name!r} (found {value!r}); {hint}")
