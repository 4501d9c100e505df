"""FedRAG's RAG system on ragkit's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ragkit.compat.fedrag_generator import HFPretrainedModelGenerator, as_template
from ragkit.compat.fedrag_names import refuse_unknown
from ragkit.compat.fedrag_nodes import RAGResponse, SourceNode
from ragkit.compat.fedrag_retriever import HFSentenceTransformerRetriever
from ragkit.compat.fedrag_store import NodeStore
from ragkit.config import RAGConfig as CoreConfig
from ragkit.rag.system import RAGSystem as CoreSystem
from ragkit.settings import Config, setting


class RAGConfig(Config):
    """FedRAG's settings of a RAG system; ragkit's own are `ragkit.RAGConfig`."""

    top_k: int = setting(2, "Nodes retrieved for a query, in training and in use.", unit="nodes", ge=1)
    context_separator: str = setting("\n", "Stands between two nodes in the prompt.")


class RAGSystem:
    """A knowledge store, a retriever and a generator.

    Everything is done by `core`, a `ragkit.RAGSystem` of the same parts: it can be saved, evaluated and trained with
    ragkit's own names. Of a `prompt_template` of your own, `core.save` keeps the text; give the loaded system the rest
    of it too: `loaded.template = as_template(text)`, or its prompts have numbered passages as other texts do.

    Args:
        generator: Answers.
        retriever: Encodes queries.
        knowledge_store: Holds the encoded nodes.
        rag_config: `top_k` and `context_separator`; may be changed later.
    """

    def __init__(
        self,
        generator: HFPretrainedModelGenerator,
        retriever: HFSentenceTransformerRetriever,
        knowledge_store: NodeStore,
        rag_config: RAGConfig | None = None,
        **unknown: Any,
    ) -> None:
        known = ["generator", "retriever", "knowledge_store", "rag_config"]
        inside = "it goes into rag_config=RAGConfig(...)"
        refuse_unknown("RAGSystem", unknown, known, {"top_k": inside, "context_separator": inside})
        for name, part, wanted in (
            ("generator", generator, HFPretrainedModelGenerator),
            ("retriever", retriever, HFSentenceTransformerRetriever),
            ("knowledge_store", knowledge_store, NodeStore),
            ("rag_config", rag_config or RAGConfig(), RAGConfig),
        ):
            if not isinstance(part, wanted):
                raise TypeError(
                    f"RAGSystem: {name} is a {type(part).__module__}.{type(part).__name__}, expected a "
                    f"{wanted.__name__} of ragkit.compat.fedrag; for parts of ragkit itself use ragkit.RAGSystem"
                )
        self.generator, self.retriever, self.knowledge_store = generator, retriever, knowledge_store
        self.rag_config = rag_config or RAGConfig()
        self._core: CoreSystem | None = None

    def __repr__(self) -> str:
        parts = (self.generator, self.retriever, self.knowledge_store)
        return f"RAGSystem({', '.join(map(repr, parts))}, top_k={self.rag_config.top_k})"

    @property
    def core(self) -> CoreSystem:
        """The `ragkit.RAGSystem`, as the settings are now; loads the models if they are not.

        Raises:
            StoreError: The nodes were encoded by another encoder.
        """
        generator = self.generator.core
        template = as_template(self.generator.prompt_template, self.rag_config.context_separator)
        if self._core is None:
            retriever = self.retriever.join(self.knowledge_store)
            self._core = CoreSystem(retriever, generator, CoreConfig(max_new_tokens=generator.max_new_tokens))
        core = self._core
        core.config.top_k = self.rag_config.top_k
        core.config.prompt = template.text if template.name == "custom" else template.name
        core.template = template
        return core

    def query(self, query: Any) -> RAGResponse:
        """Retrieves, then answers."""
        return self.batch_query([query])[0]

    def batch_query(self, queries: Sequence[Any]) -> list[RAGResponse]:
        """Retrieves for all queries, then answers them all; their prompts may differ in length."""
        answers = self.core.batch_query([str(query) for query in _listed(queries)])
        sources = self.knowledge_store.sources([answer.passages for answer in answers])
        return [RAGResponse(answer.text, nodes) for answer, nodes in zip(answers, sources, strict=True)]

    def retrieve(self, query: Any) -> list[SourceNode]:
        """The `top_k` nodes of highest cosine, best first."""
        return self.batch_retrieve([query])[0]

    def batch_retrieve(self, queries: Sequence[Any]) -> list[list[SourceNode]]:
        """The same for each query."""
        return self.knowledge_store.sources(self.core.batch_retrieve([str(query) for query in _listed(queries)]))

    def generate(self, query: Any, context: Any) -> str:
        """The answer to a query from a context (text)."""
        return str(self.generator.generate(query, context))

    def batch_generate(self, queries: Sequence[Any], contexts: Sequence[Any]) -> list[str]:
        """The answer to each query from its context.

        Raises:
            ValueError: There are not as many contexts as queries.
        """
        return list(self.generator.generate(list(_listed(queries)), list(_listed(contexts))))


def core_of(rag_system: Any) -> CoreSystem:
    """The ragkit system under a FedRAG one; ragkit's own stay as they are."""
    if isinstance(rag_system, RAGSystem):
        return rag_system.core
    if isinstance(rag_system, CoreSystem):
        return rag_system
    raise TypeError(f"rag_system: expected a RAGSystem, found {type(rag_system).__name__}")


def _listed(queries: Sequence[Any]) -> Sequence[Any]:
    if isinstance(queries, str):
        raise TypeError(f"expected a list, found one text ({queries[:60]!r}); use the method without batch_")
    return queries
