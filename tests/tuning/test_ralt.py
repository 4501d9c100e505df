"""RALT on a tiny random Llama: what carries loss, which weights move, over-fitting, and exact resume."""

from __future__ import annotations

import copy
import dataclasses
import shutil
import warnings

import pytest
import torch
from watching import losses

from ragkit.config import ConfigError, RALTConfig
from ragkit.runs import Run, RunError
from ragkit.tuning.qa_data import DataError
from ragkit.tuning.ralt import RALTTrainer
from ragkit.tuning.ralt_rows import IGNORED, Collator


@pytest.fixture
def config(tmp_path):
    def make(**changes):
        train = {"batch_size": 4, "learning_rate": 5e-3, "max_steps": 4, "warmup_steps": 0, **changes.pop("train", {})}
        return RALTConfig(**{"top_k": 2, "output_dir": str(tmp_path / "runs"), "train": train, **changes})

    return make


def test_rows_are_the_prompts_of_inference(system, questions, config):
    trainer = RALTTrainer(system, questions, config(context="joined"))
    rows = trainer.rows()
    assert len(rows) == len(questions)
    for row, question in zip(rows, questions, strict=True):
        found = system.retrieve(question["question"], 2)
        assert [p.id for p in row.passages] == [p.id for p in found]
        assert list(row.prompt_ids) == system.generator.encode_prompt("plain", question["question"], found)
        assert row.response_ids[-1] == system.generator.eos_id
        assert row.prompt.startswith("<s>Passage: ") and row.prompt.endswith("\nAnswer:")
        assert row.response == f" {question['answer']}</s>"
    assert "▶ Lima</s>" in repr(rows[0]) and "Question: What is the capital of Peru?" in repr(rows[0])


def test_each_passage_makes_an_instance(system, questions, config):
    rows = RALTTrainer(system, questions, config()).rows()
    joined = RALTTrainer(system, questions, config(context="joined")).rows()
    assert len(rows) == 2 * len(joined) and all(len(row.passages) == 1 for row in rows)
    assert [row.passages[0] for row in rows] == [passage for row in joined for passage in row.passages]


def test_labels_are_on_the_response_only_and_padding_is_on_the_right(system, questions, config):
    rows = RALTTrainer(system, questions, config(context="joined")).rows()[:4]
    batch = Collator(pad_id=0)(rows)
    assert batch["ids"] == [row.id for row in rows]
    for number, row in enumerate(rows):
        length = len(row.prompt_ids) + len(row.response_ids)
        labels, mask = batch["labels"][number], batch["attention_mask"][number]
        assert labels[labels != IGNORED].tolist() == list(row.response_ids)
        assert (labels != IGNORED).nonzero()[0].item() == len(row.prompt_ids)
        assert mask.tolist() == [1] * length + [0] * (mask.numel() - length)
        assert batch["input_ids"][number, :length].tolist() == list(row.prompt_ids + row.response_ids)


def test_the_loss_is_the_mean_negative_logprob_of_the_response(system, questions, config):
    generator = system.generator
    rows = RALTTrainer(system, questions, config()).rows()[:5]
    batch = {name: value for name, value in Collator(generator.pad_id)(rows).items() if name != "ids"}
    with torch.no_grad():
        loss = generator.model(**batch).loss.item()
        by_hand = []
        for row in rows:
            ids = torch.tensor([row.prompt_ids + row.response_ids])
            logp = generator.model(ids).logits[0].log_softmax(-1)  # [T, V]
            for t in range(len(row.prompt_ids), ids.shape[1]):
                by_hand.append(-logp[t - 1, ids[0, t]].item())
    assert loss == pytest.approx(sum(by_hand) / len(by_hand), abs=1e-5)
    scored = generator.sequence_logprob([list(r.prompt_ids) for r in rows], [list(r.response_ids) for r in rows])
    assert -scored.sum().item() == pytest.approx(sum(by_hand), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_it_overfits_and_then_answers(system, questions, config, method):
    settings = config(method=method, context="joined", train={"max_steps": 100, "learning_rate": 2e-2})
    few = questions[:4]
    result = RALTTrainer(system, few, settings).train()
    assert losses(result)[-1] < 0.2 < 3 < losses(result)[0]
    answers = system.batch_generate([q["question"] for q in few], [system.retrieve(q["question"], 2) for q in few])
    assert answers == [q["answer"] for q in few]


@pytest.mark.slow
def test_a_chat_is_trained_with_the_prompts_and_the_end_of_turn_of_its_answers(system, questions, config, tmp_path):
    generator = system.generator
    generator.tokenizer = copy.deepcopy(generator.tokenizer)
    generator.tokenizer.add_tokens(["<turn>", "</turn>"], special_tokens=True)
    generator.tokenizer.chat_template = (
        "{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}</turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
    )
    generator.model.resize_token_embeddings(len(generator.tokenizer))
    generator.chat_template, generator.system_prompt = True, "Be brief."
    few = questions[:4]
    settings = config(method="full", context="joined", train={"max_steps": 100, "learning_rate": 2e-2})
    trainer = RALTTrainer(system, few, settings)
    asked = []
    generate = generator.generate_ids
    generator.generate_ids = lambda prompts, *args: [asked.extend(prompts), generate(prompts, *args)][1]
    system.batch_generate([q["question"] for q in few], [row.passages for row in trainer.rows()])
    assert [list(row.prompt_ids) for row in trainer.rows()] == asked
    end = generator.tokenizer.convert_tokens_to_ids("</turn>")
    for row, question in zip(trainer.rows(), few, strict=True):
        assert row.prompt.startswith("<turn>system\nBe brief.</turn>\n<turn>user\nPassage: ")
        assert row.prompt.endswith("\nAnswer:</turn>\n<turn>assistant\n") and row.response_ids[-1] == end
        assert row.response == f"{question['answer']}</turn>"
    assert losses(trainer.train())[-1] < 0.2
    del generator.generate_ids
    loaded = type(system).load(system.save(tmp_path / "system"), device="cpu")
    for asked_one in (system, loaded):  # answers end with the turn, not with the longest answer
        answers = asked_one.batch_generate([q["question"] for q in few], [row.passages for row in trainer.rows()])
        assert answers == [q["answer"] for q in few]


def test_lora_moves_the_adapter_only(system, questions, config, weights, same):
    retriever = system.retriever.query_encoder.model
    base, encoder = system.generator.model, weights(retriever)
    before = weights(base)
    seen = []
    forward = base.forward

    def watched(*args, **kwargs):
        seen.append(any(parameter.requires_grad for parameter in retriever.parameters()))
        return forward(*args, **kwargs)

    base.forward = watched
    trainer = RALTTrainer(system, questions, config())
    result = trainer.train()
    del base.forward

    from peft import PeftModel

    assert seen and not any(seen)  # the retriever is frozen by requires_grad while the generator trains
    assert same(retriever, encoder) and all(parameter.requires_grad for parameter in retriever.parameters())
    assert all(event["grad_norm"] > 0 for event in result.history if "loss" in event)
    assert isinstance(system.generator.model, PeftModel) and not system.generator.model.training
    state = weights(system.generator.core)
    for name, tensor in before.items():
        kept = state.get(name, state.get(f"{name.rpartition('.')[0]}.base_layer.{name.rpartition('.')[2]}"))
        assert torch.equal(kept, tensor), name
    adapters = {name: tensor for name, tensor in state.items() if "lora_B" in name}
    assert len(adapters) == 14 and all(tensor.abs().max() > 0 for tensor in adapters.values())  # 7 layers x 2
    assert not any("lm_head" in name for name in adapters)


def test_full_moves_the_generator_only(system, questions, config, weights, same):
    encoder, model = weights(system.retriever.query_encoder.model), system.generator.model
    before = weights(model)
    RALTTrainer(system, questions, config(method="full")).train()
    assert system.generator.model is model and not model.training
    assert same(system.retriever.query_encoder.model, encoder)
    after = weights(model)
    assert all(not torch.equal(after[name], before[name]) for name in before)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_stop_and_resume_in_a_new_process_equals_the_unbroken_run(make_system, questions, config, same, method):
    shared = {"method": method, "lora_dropout": 0.1 if method == "lora" else 0.0}
    unbroken = make_system()
    wanted = RALTTrainer(unbroken, questions, config(**shared, train={"max_steps": 6})).train()

    settings = config(**shared, name="broken", train={"max_steps": 6})
    first = RALTTrainer(make_system(), questions, settings)
    calls = []

    def stop_in_the_third_step(module, _):
        calls.extend([1] * module.training)  # before, the head is tried out
        if len(calls) == 3:
            first.run.request_stop()

    handle = first.system.generator.model.model.register_forward_pre_hook(stop_in_the_third_step)
    half = first.train()
    assert half.stopped and half.steps == 3
    handle.remove()
    checkpoint = first.run.last_checkpoint()
    shutil.copytree(first.run.dir, first.run.dir.with_name("copy"))

    fresh = make_system()
    for trainer in (
        first,  # in the same process, where the adapter is there already
        RALTTrainer(fresh, questions, settings, run=Run.open(first.run.dir.with_name("copy"))),
    ):
        result = trainer.train(resume=True)
        assert losses(result) == losses(wanted) and result.steps == 6
        assert same(trainer.system.generator.model, unbroken.generator.model.state_dict())
    assert (checkpoint / "adapter_model.safetensors").exists() == (method == "lora")
    assert (checkpoint / "model.safetensors").exists() == (method == "full")


def test_a_run_is_resumed_with_its_own_instances_only(make_system, questions, config):
    first = RALTTrainer(make_system(), questions, config(name="mine", train={"max_steps": 2}))
    first.train()
    kept = (first.run.dir / "ralt_rows.json").read_text()

    def resume(system, data=questions):
        return RALTTrainer(system, data, first.config, run=Run.open(first.run.dir)).train(resume=True)

    other = make_system()
    passages = list(other.retriever.store.passages())
    other.retriever.index([dataclasses.replace(passage, text=passage.text.upper()) for passage in passages])
    with pytest.raises(DataError, match=r"20 .* now there are 20, and they differ in the prompts: another corpus"):
        resume(other)
    with pytest.raises(DataError, match="began with 20 training instances, now there are 10, .* in the questions"):
        resume(make_system(), questions[:5])
    with pytest.raises(DataError, match="differ in the answers"):
        resume(make_system(), [{**questions[0], "answer": "Cusco"}, *questions[1:]])
    with pytest.raises(RunError, match="has events"):  # begun again in the same folder: its digest stays
        RALTTrainer(make_system(), questions[:5], first.config, run=first.run).train()
    assert (first.run.dir / "ralt_rows.json").read_text() == kept
    weighted = first.config.model_copy(update={"passage_weights": "retrieval"})
    with pytest.raises(DataError, match="differ in passage_weights or weights_gamma"):
        RALTTrainer(make_system(), questions, weighted, run=Run.open(first.run.dir)).train(resume=True)
    assert resume(make_system()).steps == 2
    (first.run.dir / "ralt_rows.json").write_text("{")
    with pytest.raises(DataError, match="ralt_rows.json: cannot be read"):
        resume(make_system())


def test_an_adapter_that_is_there_is_trained_on(system, questions, config):
    RALTTrainer(system, questions, config()).train()
    model = system.generator.model
    with torch.no_grad():
        before = {name: p.clone() for name, p in model.named_parameters() if "lora_B" in name}
    RALTTrainer(system, questions, config()).train()
    assert system.generator.model is model
    after = dict(model.named_parameters())
    assert before and all(not torch.equal(after[name], tensor) for name, tensor in before.items())
    with pytest.raises(ConfigError, match="the generator carries an adapter"):
        RALTTrainer(system, questions, config(method="full")).train()


def test_long_passages_are_cut_and_the_response_never(system, questions, config):
    passages = [system.retriever.store.get(["Peru-capital"])[0]]
    long = type(passages[0])("long", "Lima is the capital of Peru. " + "It is by the sea. " * 100, "")
    system.retriever.add([long])
    rows = RALTTrainer(system, questions, config(max_length=60, top_k=21)).rows()  # all passages for each question
    rows = [row for row in rows if row.passages[0].id == "long"]
    assert len(rows) == len(questions)
    assert all(50 < len(row.prompt_ids) + len(row.response_ids) <= 60 for row in rows)
    for row, question in zip(rows, questions, strict=True):
        assert row.response == f" {question['answer']}</s>" and question["question"] in row.prompt
    assert system.generator.max_prompt_tokens is None


def test_a_response_that_does_not_fit_is_reported(system, questions, config, capsys):
    data = [
        *questions,
        {"id": "essay", "question": "Why?", "answer": "because " * 300},
        {"id": "mute", "question": "Who?", "answer": ""},
    ]
    trainer = RALTTrainer(system, data, config(context="joined"))
    assert len(trainer.rows()) == 10
    assert [identity for identity, _ in trainer.left_out] == ["mute", "essay"]
    assert "2 of 12 questions cannot be trained on" in capsys.readouterr().out
    with pytest.raises(DataError, match="1 of 1 questions cannot be trained on .*answer of"):
        RALTTrainer(system, data[10:11], config()).rows()


def test_what_makes_no_instance_is_named(system, questions, config, capsys, monkeypatch):
    """An answer without tokens, a question without passages, evaluation questions without answers."""
    from tokenizers import normalizers

    system.generator.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    try:
        data = [*questions, {"id": "blank", "question": "Why?", "answer": "\u200b"}]
        own = system.batch_retrieve

        def found(asked, top_k):
            return [[] if "Peru" in question else p for question, p in zip(asked, own(asked, top_k), strict=True)]

        monkeypatch.setattr(system, "batch_retrieve", found)
        trainer = RALTTrainer(system, data, config(train={"max_steps": 1}), eval_data=data)
        assert len(trainer.rows()) == 2 * 9
        wanted = [("blank", "the answer '\\u200b' has no token"), ("q-Peru", "no passage retrieved")]
        assert trainer.left_out == wanted
        trainer.train()
        assert "2 of 11 evaluation questions have no loss (first: blank: the answer" in capsys.readouterr().out
        mute = [{"id": "mute", "question": "Who?", "answer": ""}]
        with pytest.raises(DataError, match="1 of 1 evaluation questions have no loss .*mute: no answer"):
            RALTTrainer(system, questions, config(), eval_data=mute).train()
        with pytest.raises(DataError, match="1 of 1 questions cannot be trained on .*no passage retrieved"):
            RALTTrainer(system, questions[:1], config()).rows()
    finally:
        system.generator.tokenizer.backend_tokenizer.normalizer = None


@pytest.mark.parametrize("fused", [True, False])
def test_a_model_whose_settings_are_in_parts_is_trained_without_keys_and_values(tokenizer, make_system, config, fused):
    from transformers import AutoModelForCausalLM, Gemma3Config

    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 256}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    whole = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    system = make_system(AutoModelForCausalLM.from_config(whole).eval())
    parts = system.generator.core.config, system.generator.core.config.text_config
    before = [vars(part).get("use_cache") for part in parts]
    seen = []
    system.generator.core.register_forward_pre_hook(lambda model, args: seen.append(parts[1].use_cache))
    data = [{"question": "What is the capital of Peru?", "answer": "Lima"}]
    RALTTrainer(system, data, config(train={"max_steps": 1}, fused_loss=fused)).train()
    assert seen and not any(seen[-1:])
    assert [vars(part).get("use_cache") for part in parts] == before and "use_cache" not in vars(parts[0])


def test_random_passages_are_other_questions_passages(system, questions, config):
    retrieved = RALTTrainer(system, questions, config(context="joined")).rows()
    settings = config(context="joined")
    rows = RALTTrainer(system, questions, settings, passages="random").rows()
    for row, own, question in zip(rows, retrieved, questions, strict=True):
        ids = {passage.id for passage in row.passages}
        assert len(ids) == 2 and not ids & {p.id for p in own.passages} and not ids & set(question["supporting_facts"])
    assert RALTTrainer(system, questions, settings, passages="random").rows() == rows
    with pytest.raises(DataError, match="only 0 passages were retrieved for other questions"):
        RALTTrainer(system, questions[:1], settings, passages="random").rows()
    with pytest.raises(ConfigError, match="passages: found 'gold'"):
        RALTTrainer(system, questions, passages="gold")


def test_add_gold_puts_a_supporting_passage_in(system, questions, config):
    missed = [{**question, "supporting_facts": ["Fiji-food"]} for question in questions[:5]]
    rows = RALTTrainer(system, missed, config(context="joined", add_gold=True)).rows()
    assert all("Fiji-food" in [passage.id for passage in row.passages] and len(row.passages) == 2 for row in rows)
    found = RALTTrainer(system, questions, config(context="joined", add_gold=True)).rows()
    assert found == RALTTrainer(system, questions, config(context="joined")).rows()  # retrieval had them all


def test_gradient_checkpointing_changes_nothing_but_memory(make_system, questions, config):
    plain, saving = make_system(), make_system()
    wanted = RALTTrainer(plain, questions, config()).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # "None of the inputs have requires_grad=True"
        result = RALTTrainer(saving, questions, config(train={"gradient_checkpointing": True})).train()
    assert losses(result) == pytest.approx(losses(wanted), rel=1e-4)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in saving.generator.core.modules())
    assert saving.generator.core.config.use_cache and plain.generator.core.config.use_cache


def test_mixed_precision_ends_with_the_training(system, questions, config):
    result = RALTTrainer(system, questions, config(train={"precision": "bf16"})).train()
    assert all(torch.isfinite(torch.tensor(losses(result))))
    with torch.no_grad():
        logits = system.generator.core.lm_head(
            system.generator.core.model(torch.tensor([[1, 5, 7]])).last_hidden_state
        )
        assert torch.equal(system.generator.model(torch.tensor([[1, 5, 7]])).logits, logits)
    assert logits.dtype == torch.float32


def test_evaluation_loss_and_scores(system, questions, config):
    settings = config(train={"max_steps": 2, "eval_steps": 1})
    trainer = RALTTrainer(system, questions, settings, eval_data=questions[:4])
    result = trainer.train()
    assert [event["step"] for event in result.history if "eval_loss" in event] == [1, 2]
    metrics = trainer.evaluate().metrics
    assert {"em", "f1"} <= metrics.keys()


def test_wrong_lora_targets_are_named(system, questions, config):
    with pytest.raises(ConfigError, match=r"no linear layer is called 'qproj' \(did you mean 'q_proj'\?\)"):
        RALTTrainer(system, questions, config(lora_targets=["qproj"])).train()
    RALTTrainer(system, questions, config(lora_targets=["q_proj"], train={"max_steps": 1})).train()
    assert {
        n.split(".lora_")[0].rsplit(".", 1)[-1] for n, _ in system.generator.model.named_parameters() if "lora_" in n
    } == {"q_proj"}


def test_joined_passages_are_mixed_once_and_for_all_on_request(system, questions, config):
    ranked = RALTTrainer(system, questions, config(context="joined")).rows()
    mixed = RALTTrainer(system, questions, config(context="joined", shuffle_passages=True)).rows()
    assert [set(p.id for p in row.passages) for row in mixed] == [set(p.id for p in row.passages) for row in ranked]
    assert 0 < sum(a.passages != b.passages for a, b in zip(mixed, ranked, strict=True)) < len(ranked)
    assert mixed == RALTTrainer(system, questions, config(context="joined", shuffle_passages=True)).rows()
