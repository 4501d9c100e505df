"""FedRAG's quick start with only its import lines changed.

::

    from ragkit.compat.fedrag import (
        HFPretrainedModelGenerator, HFSentenceTransformerRetriever, HuggingFaceRAGTrainerManager,
        HuggingFaceTrainerForLSR, HuggingFaceTrainerForRALT, InMemoryKnowledgeStore, KnowledgeNode, NodeType,
        RAGConfig, RAGSystem,
    )

Everything is done by ragkit's own parts; each object here gives the one behind it, for what FedRAG has no name for
(saving, comparing, charts, controls).

| FedRAG                                       | ragkit                                                   | behind  |
|----------------------------------------------|----------------------------------------------------------|---------|
| RAGSystem, RAGConfig                         | RAGSystem, RAGConfig                                     | .core   |
| RAGResponse, SourceNode                      | Answer, RetrievedPassage                                 |         |
| KnowledgeNode, NodeType                      | Passage (text only) and its embedding                    |         |
| InMemoryKnowledgeStore                       | MemoryStore                                              | .store  |
| QdrantKnowledgeStore                         | QdrantStore                                              | .store  |
| HFSentenceTransformerRetriever               | DenseRetriever                                           | .join() |
| HFPretrainedModelGenerator, HFPeftModelGenerator | Generator                                            | .core   |
| HuggingFaceTrainerForLSR                     | LSRTrainer, LSRConfig                                    | itself  |
| HuggingFaceTrainerForRALT                    | RALTTrainer, RALTConfig                                  | itself  |
| HuggingFaceRAGTrainerManager (…TrainerManager) | TrainerManager                                         | itself  |
| LSRLoss                                      | ragkit_kernels.lsr_loss                                  |         |
| DataCollatorForLSR, DataCollatorForRALT      | LSRTrainer.rows(), RALTTrainer.rows()                    |         |
| HuggingFaceFLTask (.get_federated_task())    | ragkit.federated: FederatedTask                          | itself  |
| transformers.TrainingArguments               | TrainConfig                                              |         |

What is not the same, and why:

- LSR trains: scores are computed with gradient into the query encoder, and the LM's are log-probabilities of the
  response alone. RALT's labels are on the response and the end of sequence. Both are asserted by our tests.
- LSR's formula is by default ragkit's; `config=LSRConfig(preset="fedrag")` takes FedRAG's. With one encoder for both
  sides only the query side moves, so the index stays valid.
- `encode_context(text)` and `encode_query(text)` give [D] for one text, [N, D] for a list.
- A node loaded twice is replaced; retrieved nodes have embeddings of length 1.
- Unknown arguments are errors. Training arguments that are not used are listed in a warning and in
  `trainer.unused_arguments`; those without which it would be another training are errors.
"""

from __future__ import annotations

from typing import Any

from ragkit.compat.fedrag_federated import HuggingFaceFLTask
from ragkit.compat.fedrag_generator import HFPeftModelGenerator, HFPretrainedModelGenerator, as_template
from ragkit.compat.fedrag_loss import DataCollatorForLSR, DataCollatorForRALT, LSRLoss, ReductionMode
from ragkit.compat.fedrag_names import NOT_HERE
from ragkit.compat.fedrag_nodes import KnowledgeNode, NodeType, RAGResponse, SourceNode
from ragkit.compat.fedrag_retriever import HFSentenceTransformerRetriever, LoadKwargs
from ragkit.compat.fedrag_store import InMemoryKnowledgeStore, QdrantKnowledgeStore
from ragkit.compat.fedrag_system import RAGConfig, RAGSystem
from ragkit.compat.fedrag_training import (
    HuggingFaceRAGTrainerManager,
    HuggingFaceTrainerForLSR,
    HuggingFaceTrainerForRALT,
    HuggingFaceTrainerManager,
    RAGTrainMode,
)

__all__ = [
    "DataCollatorForLSR",
    "DataCollatorForRALT",
    "HFPeftModelGenerator",
    "HFPretrainedModelGenerator",
    "HFSentenceTransformerRetriever",
    "HuggingFaceFLTask",
    "HuggingFaceRAGTrainerManager",
    "HuggingFaceTrainerForLSR",
    "HuggingFaceTrainerForRALT",
    "HuggingFaceTrainerManager",
    "InMemoryKnowledgeStore",
    "KnowledgeNode",
    "LSRLoss",
    "LoadKwargs",
    "NodeType",
    "QdrantKnowledgeStore",
    "RAGConfig",
    "RAGResponse",
    "RAGSystem",
    "RAGTrainMode",
    "ReductionMode",
    "SourceNode",
    "as_template",
]


def __getattr__(name: str) -> Any:
    if name in NOT_HERE:
        # Not an AttributeError: `from ... import` would replace its message.
        raise ImportError(f"ragkit has no {name}: {NOT_HERE[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
