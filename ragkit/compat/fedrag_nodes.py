"""FedRAG's data structures: nodes of a knowledge store, and what a query gives back."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from pydantic import Field, field_validator, model_validator

from ragkit.rag.corpus import Passage
from ragkit.settings import Config, setting


class NodeType(str, Enum):
    """What a node holds. Only text can be used here."""

    TEXT = "text"
    IMAGE = "image"
    MULTIMODAL = "multimodal"


class KnowledgeNode(Config):
    """A passage with its embedding. Without `node_id` it gets a new one."""

    node_id: str = Field(default_factory=lambda: str(uuid.uuid4()), description="Unique in its store.")
    embedding: list[float] | None = setting(
        None, "Its encoding, a list, tensor or array of D numbers; of a node that was retrieved: of length 1."
    )
    node_type: NodeType = setting(NodeType.TEXT, "Kind of the content; text is what encoders and LMs here read.")
    text_content: str | None = setting(None, "The text.")
    image_content: bytes | None = setting(None, "Always null here.")
    metadata: dict[str, Any] = Field(default_factory=dict, description="Anything JSON can hold, or its JSON text.")

    @field_validator("embedding", mode="before")
    @classmethod
    def _flat(cls, value: Any) -> Any:
        """Tensors and arrays as lists; a batch of one, as `encode_context([text])` gives it, as that one."""
        value = value.tolist() if hasattr(value, "tolist") else value
        return value[0] if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list) else value

    @field_validator("metadata", mode="before")
    @classmethod
    def _parsed(cls, value: Any) -> Any:
        return json.loads(value) if isinstance(value, str) else (value or {})

    @model_validator(mode="after")
    def _is_text(self) -> KnowledgeNode:
        if self.node_type is not NodeType.TEXT or self.image_content is not None:
            raise ValueError(
                f"text nodes (the encoders and language models here read text only); found a node of type "
                f"{self.node_type.value!r}: describe the image in text_content, with NodeType.TEXT"
            )
        if self.text_content is None:
            raise ValueError("text_content, which a node of NodeType.TEXT needs")
        return self

    def get_content(self) -> dict[str, Any]:
        """Its text, and the image that it does not have."""
        return {"text_content": self.text_content, "image_content": self.image_content}

    def model_dump_without_embeddings(self) -> dict[str, Any]:
        """All but the embedding, as a dict."""
        return self.model_dump(exclude={"embedding"})


def passage_of(node: KnowledgeNode) -> Passage:
    """The node as a passage: what is encoded and prompted is its text, so titles stay in the metadata."""
    return Passage(node.node_id, node.text_content or "", metadata=node.metadata)


def node_of(passage: Passage, embedding: Sequence[float]) -> KnowledgeNode:
    """The node that a passage of the store was made from, with the store's embedding of it."""
    return KnowledgeNode(
        node_id=passage.id, text_content=passage.text, metadata=passage.metadata, embedding=list(embedding)
    )


@dataclass(frozen=True)
class SourceNode:
    """A retrieved node with its score (cosine); what the node has can be asked of it as well."""

    score: float
    node: KnowledgeNode

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "node":  # copy and pickle ask for these before there is a node
            raise AttributeError(name)
        return getattr(self.node, name)


@dataclass(frozen=True)
class RAGResponse:
    """The answer to a query and the nodes that it was made from, best first. Prints as the answer."""

    response: str
    source_nodes: list[SourceNode]
    raw_response: str | None = None

    def __str__(self) -> str:
        return self.response
