"""FedRAG's quick start pages with other import lines: what they call is called here, and it trains."""

from __future__ import annotations

import json

import pytest

import ragkit.compat.fedrag as fedrag


def build(encoder_folder, adapter_folder, lm_folder):
    """The page "Build a RAG System", both versions, with models and texts of ours."""
    from transformers.generation.utils import GenerationConfig

    from ragkit.compat.fedrag import (
        HFPeftModelGenerator,
        HFSentenceTransformerRetriever,
        InMemoryKnowledgeStore,
        KnowledgeNode,
        NodeType,
        RAGConfig,
        RAGSystem,
    )

    retriever = HFSentenceTransformerRetriever(
        query_model_name=encoder_folder, context_model_name=encoder_folder, load_model_at_init=False
    )
    chunks_json_strs = [
        '{"id": "0", "title": "Orchid", "text": "Orchids have small seeds and flowers of two equal halves."}',
        '{"id": "1", "title": "Tulip", "text": "Tulips grow from bulbs; a tulip flowers in spring."}',
    ]
    chunks = [json.loads(line) for line in chunks_json_strs]
    knowledge_store = InMemoryKnowledgeStore()
    nodes = []
    for c in chunks:
        node = KnowledgeNode(
            embedding=retriever.encode_context(c["text"]).tolist(),
            node_type=NodeType.TEXT,
            text_content=c["text"],
            metadata={"title": c["title"], "id": c["id"]},
        )
        nodes.append(node)
    knowledge_store.load_nodes(nodes=nodes)

    generation_cfg = GenerationConfig(
        do_sample=True,
        eos_token_id=[128000, 128009],
        bos_token_id=128000,
        max_new_tokens=4096,
        top_p=0.9,
        temperature=0.6,
        cache_implementation="offloaded",
        stop_strings="</response>",
    )
    generator = HFPeftModelGenerator(
        model_name=adapter_folder,
        base_model_name=lm_folder,
        generation_config=generation_cfg,
        load_model_at_init=False,
        load_model_kwargs={"is_trainable": True, "device_map": "auto"},
        load_base_model_kwargs={"device_map": "auto"},  # the page's 4 bits need a GPU and bitsandbytes
    )
    rag_config = RAGConfig(top_k=2)
    return RAGSystem(knowledge_store=knowledge_store, generator=generator, retriever=retriever, rag_config=rag_config)


@pytest.fixture
def quick_start(encoder_folder, adapter_folder, lm_folder):
    return build(encoder_folder, adapter_folder, lm_folder)


def test_page_build_a_rag_system(quick_start):
    with pytest.warns(UserWarning, match="max_new_tokens is 4096, but the model has positions for 256"):
        response = quick_start.query("What is a Tulip?")
    assert f"{response}" == response.response and isinstance(response.response, str)
    assert [node.metadata["title"] for node in response.source_nodes] == ["Tulip", "Orchid"]
    assert response.source_nodes[0].score > response.source_nodes[1].score
    assert response.source_nodes[0].node.text_content.startswith("Tulips grow")


def test_page_fine_tune_first_version(quick_start, rows, in_tmp, weights, same):
    from ragkit.compat.fedrag import HuggingFaceTrainerForLSR, HuggingFaceTrainerForRALT, HuggingFaceTrainerManager

    rag_system, train_dataset = quick_start, [rows]
    generator_trainer = HuggingFaceTrainerForRALT(rag_system=rag_system, train_dataset=train_dataset)
    retriever_trainer = HuggingFaceTrainerForRALT(rag_system=rag_system, train_dataset=train_dataset)
    with pytest.raises(TypeError, match="trains the generator; the retriever is trained by HuggingFaceTrainerForLSR"):
        HuggingFaceTrainerManager(
            mode="retriever", retriever_trainer=retriever_trainer, generator_trainer=generator_trainer
        )
    retriever_trainer = HuggingFaceTrainerForLSR(rag_system, train_dataset)
    with pytest.raises(TypeError, match="the generator is trained by HuggingFaceTrainerForRALT"):
        HuggingFaceTrainerManager(mode="generator", generator_trainer=retriever_trainer)
    manager = HuggingFaceTrainerManager(
        mode="retriever", retriever_trainer=retriever_trainer, generator_trainer=generator_trainer
    )
    retriever = rag_system.retriever
    query, context = weights(retriever.query_encoder), weights(retriever.context_encoder)
    train_result = manager.train()
    assert train_result.loss > 0 and f"loss: {train_result.loss}"
    assert train_result.steps == 3  # three epochs of one batch, as transformers' defaults say
    assert not same(retriever.query_encoder, query)
    assert same(retriever.context_encoder, context)


def test_page_fine_tune_current_version(quick_start, rows, in_tmp, weights, same):
    from datasets import Dataset

    from ragkit.compat.fedrag import (
        HuggingFaceRAGTrainerManager,
        HuggingFaceTrainerForLSR,
        HuggingFaceTrainerForRALT,
        RAGTrainMode,
    )

    rag_system, train_dataset = quick_start, Dataset.from_dict(rows)
    generator_trainer = HuggingFaceTrainerForRALT(rag_system=rag_system, train_dataset=train_dataset)
    retriever_trainer = HuggingFaceTrainerForLSR(rag_system=rag_system, train_dataset=train_dataset)
    manager = HuggingFaceRAGTrainerManager(
        mode=RAGTrainMode.GENERATOR, retriever_trainer=retriever_trainer, generator_trainer=generator_trainer
    )
    assert manager.mode == RAGTrainMode.GENERATOR == "generator"
    model = manager.model
    lm, encoder = weights(model), weights(rag_system.retriever.query_encoder)
    assert manager.train().loss > 0
    moved = {name for name, tensor in model.state_dict().items() if not (tensor == lm[name]).all()}
    assert moved and all("lora_" in name for name in moved)  # the adapter and nothing else
    assert same(rag_system.retriever.query_encoder, encoder)
    manager.mode = "retriever"
    assert manager.model is rag_system.retriever.query_encoder
    lm = weights(model)
    assert manager.train().loss > 0
    assert not same(manager.model, encoder) and same(model, lm)
    assert rag_system.query("What is a Tulip?").source_nodes
    found = manager.evaluate([{"query": "What is a tulip?", "response": "a plant"}])
    assert found.metrics["em"].n == 1


def test_trainers_alone_as_in_an_earlier_page(make_fedrag, rows, in_tmp, weights, same):
    from ragkit.compat.fedrag import HuggingFaceTrainerForLSR, HuggingFaceTrainerForRALT

    rag_system = make_fedrag()
    model = rag_system.generator.model
    before = weights(model)
    assert HuggingFaceTrainerForRALT(rag_system, [rows]).train().loss > 0
    assert rag_system.generator.model is model and not same(model, before)  # all weights, as FedRAG trains them
    encoder = rag_system.retriever.encoder
    before, lm = weights(encoder), weights(model)
    trainer = HuggingFaceTrainerForLSR(rag_system, [rows])
    assert trainer.model is encoder
    assert trainer.train().loss > 0
    # The object that a user looks at before and after is the one that is trained; the index fits its copy.
    assert rag_system.retriever.encoder is trainer.model is encoder and not same(encoder, before)
    assert same(rag_system.retriever.context_encoder, before) and same(model, lm)
    assert len(list((in_tmp / "runs").iterdir())) >= 2


def test_every_name_is_there_or_says_what_to_use():
    for name in fedrag.__all__:
        assert getattr(fedrag, name) is not None
        if name not in ("LoadKwargs", "RAGTrainMode", "ReductionMode", "as_template"):
            assert name in fedrag.__doc__ or f"…{name.removeprefix('HuggingFace')}" in fedrag.__doc__, name
    with pytest.raises(ImportError, match=r"ragkit has no AsyncRAGSystem: use RAGSystem; await asyncio.to_thread"):
        from ragkit.compat.fedrag import AsyncRAGSystem  # noqa: F401
    with pytest.raises(ImportError, match="every store here is searched by embeddings"):
        from ragkit.compat.fedrag import NoEncodeRAGSystem  # noqa: F401
    with pytest.raises(AttributeError, match="has no attribute 'RagSystem'"):
        fedrag.RagSystem  # noqa: B018
