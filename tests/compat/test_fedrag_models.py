"""FedRAG's retriever, generators and system: what they give back, and that ragkit's parts are behind them."""

from __future__ import annotations

import math

import pytest
import torch

from ragkit.compat.fedrag import (
    HFPeftModelGenerator,
    HFPretrainedModelGenerator,
    HFSentenceTransformerRetriever,
    InMemoryKnowledgeStore,
    LoadKwargs,
    RAGConfig,
    RAGSystem,
)
from ragkit.prompts import PromptError
from ragkit.rag.store import StoreError
from ragkit.settings import ConfigError

TEMPLATE = "Say it.\n<query>{query}</query>\n<context>\n{context}\n</context>\n{{json}}\n<response>\n"


# ---- the retriever ----


def test_one_encoder_or_two(encoder_folder):
    one = HFSentenceTransformerRetriever(encoder_folder)
    assert one.encoder is not None and one.query_encoder is None and one.context_encoder is None
    two = HFSentenceTransformerRetriever(query_model_name=encoder_folder, context_model_name=encoder_folder)
    assert two.encoder is None and two.query_encoder is not two.context_encoder
    vector = one.encode_query("a tulip")
    assert vector.shape == (384,) and vector.norm().item() == pytest.approx(1, abs=1e-5)
    both = two.encode_context(["a tulip", "a long text about something else"])
    assert both.shape == (2, 384)
    torch.testing.assert_close(both[0], vector, atol=1e-5, rtol=0)
    theirs = one.encoder.encode(["a tulip"], convert_to_tensor=True)
    torch.testing.assert_close(theirs[0].cpu(), vector.cpu(), atol=1e-5, rtol=0)


def test_retriever_arguments(encoder_folder):
    for given in ({}, {"query_model_name": "x"}, {"model_name": "x", "query_model_name": "y"}):
        with pytest.raises(ValueError, match="give model_name for one encoder, or query_model_name and context_model"):
            HFSentenceTransformerRetriever(**given)
    with pytest.raises(TypeError, match="unknown argument 'modelname' .*did you mean 'model_name'"):
        HFSentenceTransformerRetriever(modelname="x")
    with pytest.raises(ValueError, match="no text encoder could be loaded from '/nowhere'"):
        HFSentenceTransformerRetriever("/nowhere")
    lazy = HFSentenceTransformerRetriever("/nowhere", load_model_at_init=False)
    with pytest.raises(ValueError, match="/nowhere"):
        lazy.encode_query("x")
    short = HFSentenceTransformerRetriever(encoder_folder, load_model_kwargs={"truncate_dim": 8})
    assert short.encode_query("x").shape == (8,)
    each = LoadKwargs(query_encoder={"truncate_dim": 8}, context_encoder={"truncate_dim": 8})
    two = HFSentenceTransformerRetriever(None, encoder_folder, encoder_folder, load_model_kwargs=each)
    assert two.encode_context(["x", "y"]).shape == (2, 8)


def test_a_retriever_and_a_store_may_be_part_of_two_systems(make_fedrag):
    first = make_fedrag()
    second = make_fedrag(retriever=first.retriever)
    third = make_fedrag(retriever=first.retriever, store=first.knowledge_store)
    cores = [system.core.retriever for system in (first, second, third)]
    assert cores[0].separate_query_encoder()
    assert all(core.query_encoder is cores[0].query_encoder and not core.shared for core in cores)
    cores[0].mark_stale()
    assert all(core.stale for core in cores)
    old = first.knowledge_store.store
    cores[0].refresh()  # fills a new ragkit store, which the knowledge store must hold now
    assert [core.stale for core in cores] == [False, True, False]
    assert first.knowledge_store.store is cores[0].store is cores[2].store is not cores[1].store
    assert first.knowledge_store.store is not old
    assert first.knowledge_store.count == 4 and first.retrieve("Peru")
    fourth = make_fedrag(retriever=first.retriever, store=second.knowledge_store).core.retriever
    assert fourth.stale  # joining does not make a stale store fit
    with pytest.warns(UserWarning, match="call refresh"):
        second.retrieve("Peru")
    second.knowledge_store.clear()
    second.knowledge_store.load_nodes([])
    assert not cores[1].stale


# ---- the generators ----


def test_prompt_template_and_separator_make_the_prompt(make_fedrag):
    rag = make_fedrag(prompt_template=TEMPLATE)
    rag.rag_config.context_separator = " | "
    core, tokenizer = rag.core, rag.generator.tokenizer
    found = rag.core.retrieve("Peru?")
    prompt = tokenizer.decode(rag.generator.core.encode_prompt(core.template, "Peru?", found))
    joined = " | ".join(passage.text for passage in found)
    assert prompt == TEMPLATE.format(query="Peru?", context=joined)
    assert core.template.response_prefix == ""  # the template ends in white space
    rag.rag_config.top_k = 1
    assert len(rag.retrieve("Peru?")) == 1  # settings are read when they are used
    rag.generator.prompt_template = "{context} {query}"
    assert rag.core.template.response_prefix == " "
    for wrong, message in [
        ("{query}", r"must hold \{passages\} exactly once, found 0"),
        ("{context} {question} {answer}", "'answer' cannot be filled in"),
        ("{context} {query} }", "cannot be filled in"),
    ]:
        with pytest.raises(PromptError, match=message):
            rag.generator.prompt_template = wrong


def test_target_probability_is_that_of_the_models_own_loss(lm_folder):
    """FedRAG's is off by one token; this one is exp(-loss * tokens) with labels on the target alone."""
    generator = HFPretrainedModelGenerator(lm_folder)
    prompt, target = "Question: What is the capital of Peru?\nAnswer:", " Lima"
    tokenizer, model = generator.tokenizer, generator.model
    head = tokenizer(prompt)["input_ids"]
    tail = tokenizer(target, add_special_tokens=False)["input_ids"]
    ids, labels = torch.tensor([head + tail]), torch.tensor([[-100] * len(head) + tail])
    with torch.no_grad():
        loss = model(input_ids=ids, labels=labels).loss
    probability = generator.compute_target_sequence_proba(prompt, target)
    assert probability.item() == pytest.approx(math.exp(-loss.item() * len(tail)), rel=1e-4)
    long = generator.compute_target_sequence_proba(prompt, " Quito is the capital" * 4)
    assert long.item() > 0 and long.float().item() == 0  # what FedRAG's float32 makes of it


def test_live_models_and_the_setters(live_lm, lm_folder, tokenizer):
    live = HFPretrainedModelGenerator(live_lm, tokenizer=tokenizer)
    named = HFPretrainedModelGenerator(lm_folder)
    assert live.complete("Lima is") == named.complete("Lima is")
    assert live.model is live_lm
    with torch.no_grad():
        live_lm.lm_head.weight.mul_(-1)
    later = HFPretrainedModelGenerator("not/there", load_model_at_init=False)
    later.model, later.tokenizer = live_lm, tokenizer
    assert later.complete("Lima is") == live.complete("Lima is") != named.complete("Lima is")
    named.model = live_lm
    assert named.complete("Lima is") == live.complete("Lima is")
    with pytest.raises(ValueError, match="needs its tokenizer"):
        HFPretrainedModelGenerator(live_lm)


def test_generation_config_is_followed(tokenizer, lm_folder):
    from transformers import GenerationConfig

    def generator(**settings):
        return HFPretrainedModelGenerator(lm_folder, GenerationConfig(**settings))

    assert len(tokenizer(generator(max_new_tokens=3).complete("Lima is"))["input_ids"]) <= 3
    greedy = generator(max_new_tokens=12).complete("Lima is")
    assert greedy == HFPretrainedModelGenerator(lm_folder).complete("Lima is")[: len(greedy)]
    sampled = generator(max_new_tokens=12, do_sample=True, temperature=5.0)
    torch.manual_seed(0)
    texts = {sampled.complete("Lima is") for _ in range(4)}
    assert len(texts) > 1  # greedy answers would be one
    stop = greedy[2:4]
    stopped = generator(max_new_tokens=12, stop_strings=stop).complete("Lima is")
    assert greedy.startswith(stopped.rstrip()) and len(stopped) < len(greedy)
    ids = tokenizer(greedy)["input_ids"]
    assert generator(max_new_tokens=12, eos_token_id=ids[3]).complete("Lima is") != greedy
    for wrong, message in [
        ({"max_length": 50}, "max_length: found 50; it counts the prompt too; give max_new_tokens"),
        ({"num_return_sequences": 3, "do_sample": True}, "num_return_sequences: found 3; a query has one answer"),
        ({"return_dict_in_generate": True}, "answers come as text"),
    ]:
        with pytest.raises(ValueError, match=message):
            generator(**wrong)


def test_adapters(adapter_folder, lm_folder):
    generator = HFPeftModelGenerator(adapter_folder, lm_folder)
    assert hasattr(generator.model, "peft_config")
    assert generator.complete("Lima is") == HFPretrainedModelGenerator(lm_folder).complete("Lima is")  # B is 0
    with pytest.raises(ValueError, match="needs base_model_name"):
        HFPeftModelGenerator(adapter_folder)
    with pytest.raises(ValueError, match="no PEFT adapter could be loaded from"):
        HFPeftModelGenerator(lm_folder, lm_folder)


def test_generator_arguments(lm_folder):
    with pytest.raises(TypeError, match="'max_new_tokens' .*it goes into generation_config=GenerationConfig"):
        HFPretrainedModelGenerator(lm_folder, max_new_tokens=3)
    with pytest.raises(TypeError, match="'device_map' .*it goes into load_model_kwargs"):
        HFPeftModelGenerator(lm_folder, lm_folder, device_map="auto")
    with pytest.raises(ValueError, match="no language model could be loaded from '/nowhere'"):
        HFPretrainedModelGenerator("/nowhere")
    generator = HFPretrainedModelGenerator(lm_folder, load_model_kwargs={"dtype": torch.bfloat16})
    assert generator.model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="one context for every query; found 2 queries, 1"):
        generator.generate(["a", "b"], ["c"])


# ---- the system ----


def test_system_contract(make_fedrag):
    rag = make_fedrag()
    found = rag.retrieve("What is the capital of Ghana?")
    assert found[0].node_id == "Ghana" and len(found) == 2 and found[0].metadata == {"title": "Ghana"}
    queries = ["What is the capital of Norway, of which one hears so much in winter?", "Peru?", "A tulip?"]
    assert [row[0].node_id for row in rag.batch_retrieve(queries)] == ["Norway", "Peru", "Tulip"]
    responses = rag.batch_query(queries)  # prompts of different lengths
    assert [response.response for response in responses] == [rag.query(query).response for query in queries]
    assert [response.source_nodes[0].node_id for response in responses] == ["Norway", "Peru", "Tulip"]
    contexts = ["Lima is the capital of Peru.", "Oslo."]
    assert rag.batch_generate(["Peru?", "Norway?"], contexts) == [
        rag.generate("Peru?", contexts[0]),
        rag.generate(query="Norway?", context=contexts[1]),
    ]
    with pytest.raises(ValueError, match="one context for every query; found 2 queries, 1"):
        rag.batch_generate(["Peru?", "Norway?"], ["Lima."])
    with pytest.raises(TypeError, match="expected a list, found one text"):
        rag.batch_query("Peru?")


def test_an_empty_store_answers_without_sources(make_fedrag):
    rag = make_fedrag()
    rag.knowledge_store.clear()
    response = rag.query("Peru?")
    assert response.source_nodes == [] and isinstance(response.response, str)


@pytest.mark.parametrize("text", [None, "{context}\nQ: {query}\nA:"])
def test_the_core_is_saved_and_loaded(text, make_fedrag, tmp_path):
    from ragkit import RAGSystem as Core
    from ragkit.compat.fedrag import as_template

    rag = make_fedrag(prompt_template=text)
    rag.core.save(tmp_path / "saved")
    loaded = Core.load(tmp_path / "saved", device=str(rag.generator.model.device))
    if text is not None:
        loaded.template = as_template(text)
    assert loaded.template == rag.core.template and loaded.config.top_k == 2
    assert loaded.query("Peru?").text == rag.query("Peru?").response


def test_parts_of_other_kinds_are_named(make_fedrag, encoder_folder):
    rag = make_fedrag()
    parts = {"generator": rag.generator, "retriever": rag.retriever, "knowledge_store": rag.knowledge_store}
    with pytest.raises(TypeError, match=r"generator is a ragkit.*SamplingGenerator, expected a HFPretrainedModel"):
        RAGSystem(**{**parts, "generator": rag.generator.core})
    with pytest.raises(TypeError, match=r"'top_k' .*it goes into rag_config=RAGConfig"):
        RAGSystem(**parts, top_k=3)
    with pytest.raises(ConfigError, match="top_k: found 0"):
        RAGConfig(top_k=0)
    with pytest.raises(ConfigError, match='unknown key "topk".*did you mean "top_k"'):
        RAGConfig(topk=3)
    from ragkit.compat.fedrag import KnowledgeNode

    other = InMemoryKnowledgeStore.from_nodes([KnowledgeNode(text_content="t", embedding=[1.0, 2.0])])
    with pytest.raises(StoreError, match="the store holds embeddings of size 2, the passage encoder makes 384"):
        RAGSystem(**{**parts, "knowledge_store": other}).query("x")
