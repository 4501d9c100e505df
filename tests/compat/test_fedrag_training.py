"""FedRAG's trainers and manager: what their arguments become, what they train, and every mix-up named."""

from __future__ import annotations

import pytest
import torch
from silence import no_warning

from ragkit import LSRConfig, RALTConfig
from ragkit.compat.fedrag import (
    HFPeftModelGenerator,
    HuggingFaceFLTask,
    HuggingFaceRAGTrainerManager,
    HuggingFaceTrainerForLSR,
    HuggingFaceTrainerForRALT,
    HuggingFaceTrainerManager,
    RAGSystem,
    RAGTrainMode,
)
from ragkit.compat.fedrag_arguments import convert_arguments
from ragkit.config import ConfigError, TrainConfig
from ragkit.tuning.qa_data import DataError


def arguments(tmp_path, **given):
    from transformers import TrainingArguments

    return TrainingArguments(**{"output_dir": str(tmp_path / "out"), **given})


@pytest.fixture
def quiet(tmp_path):
    """Two steps, and a folder of the test for the runs."""
    return arguments(tmp_path, max_steps=2, per_device_train_batch_size=2, report_to="none")


# ---- training arguments ----


def test_arguments_become_settings(tmp_path, make_fedrag, rows):
    given = arguments(
        tmp_path,
        per_device_train_batch_size=3,
        learning_rate=1e-3,
        num_train_epochs=2,
        max_steps=7,
        warmup_steps=4,
        lr_scheduler_type="cosine",
        weight_decay=0.1,
        max_grad_norm=0.5,
        gradient_accumulation_steps=2,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),  # without a GPU, transformers asks for it with bf16
        seed=9,
        logging_steps=5,
        save_steps=30,
        save_total_limit=4,
        report_to="none",
        remove_unused_columns=False,
    )
    with no_warning():  # all of them are used
        trainer = HuggingFaceTrainerForLSR(make_fedrag(top_k=3), [rows], training_arguments=given)
    assert trainer.config.train.model_dump() == {
        **TrainConfig().model_dump(),
        "batch_size": 3,
        "learning_rate": 1e-3,
        "num_epochs": 2.0,
        "max_steps": 7,
        "warmup_steps": 4,
        "schedule": "cosine",
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "gradient_accumulation_steps": 2,
        "precision": "bf16",
        "seed": 9,
        "logging_steps": 5,
        "save_steps": 30,
        "save_total_limit": 4,
    }
    assert trainer.config.output_dir == str(tmp_path / "out") and trainer.config.top_k == 3
    assert trainer.unused_arguments == [] and trainer.training_arguments is given


def test_without_arguments_the_defaults_are_those_of_transformers(make_fedrag, rows, tmp_path):
    trainer = HuggingFaceTrainerForRALT(make_fedrag(), [rows])
    same = HuggingFaceTrainerForRALT(make_fedrag(), [rows], arguments(tmp_path))
    for train in (trainer.config.train, same.config.train):
        assert (train.batch_size, train.learning_rate, train.num_epochs, train.warmup_steps) == (8, 5e-5, 3.0, 0)
        assert train.seed == 42 and train.schedule == "linear" and train.save_steps == 50 and train.logging_steps == 1
    assert trainer.config.output_dir == RALTConfig().output_dir


def test_what_is_not_used_is_listed(tmp_path):
    given = arguments(tmp_path, run_name="x", dataloader_num_workers=3, push_to_hub=False, torch_compile=True)
    with pytest.warns(UserWarning) as caught:
        made = convert_arguments(given)
    text = str(caught[0].message)
    assert caught[0].category is UserWarning and len(caught) == 1
    assert {name for name, _, _ in made.unused} >= {"run_name", "dataloader_num_workers", "torch_compile"}
    assert "run_name='x': the run folder is named by the time" in text and "dataloader_num_workers=3" in text
    for name, value, word in [
        ("save_strategy", "epoch", "save_strategy='steps'"),
        ("save_steps", 0.5, "a number of steps"),
        ("logging_strategy", "epoch", "an event is written every step"),
        ("logging_steps", 0.5, "a number of steps"),
        ("eval_strategy", "epoch", "eval_strategy='steps'"),
    ]:
        with pytest.warns(UserWarning, match=word):
            made = convert_arguments(arguments(tmp_path, **{name: value}))
        assert name in {unused for unused, _, _ in made.unused}
        TrainConfig(**made.train)
    assert convert_arguments(arguments(tmp_path, save_strategy="no")).train["save_steps"] is None
    assert convert_arguments(arguments(tmp_path, eval_strategy="steps", eval_steps=4)).train["eval_steps"] == 4


def test_what_would_be_another_training_is_refused(tmp_path, make_fedrag, rows):
    for name, value, reason in [
        ("optim", "adafactor", "the optimizer is AdamW"),
        ("adam_beta2", 0.95, "usual betas"),
        ("label_smoothing_factor", 0.1, "those of the papers"),
        ("data_seed", 5, "drawn from seed"),
    ]:
        with pytest.raises(ConfigError, match=f"training_arguments.{name}: found .*{reason}; leave it out"):
            convert_arguments(arguments(tmp_path, **{name: value}))
    with pytest.raises(ConfigError, match="lr_scheduler_type: found 'polynomial', expected one of linear"):
        convert_arguments(arguments(tmp_path, lr_scheduler_type="polynomial"))
    convert_arguments(arguments(tmp_path, optim="adamw_torch", data_seed=42))  # what is done anyway
    with pytest.raises(TypeError, match="found TrainConfig; ragkit's own settings go into config="):
        HuggingFaceTrainerForLSR(make_fedrag(), [rows], TrainConfig())


def test_constant_schedules_mean_what_transformers_means(tmp_path):
    plain = convert_arguments(arguments(tmp_path, lr_scheduler_type="constant", warmup_steps=9)).train
    assert (plain["schedule"], plain["warmup_steps"]) == ("constant", 0)
    warm = convert_arguments(arguments(tmp_path, lr_scheduler_type="constant_with_warmup", warmup_steps=9)).train
    assert (warm["schedule"], warm["warmup_steps"]) == ("constant", 9)


def test_arguments_of_sentence_transformers_are_read(tmp_path):
    from sentence_transformers import SentenceTransformerTrainingArguments

    given = SentenceTransformerTrainingArguments(output_dir=str(tmp_path), warmup_ratio=0.1, learning_rate=1e-4)
    made = convert_arguments(given)
    assert made.train["warmup_steps"] == pytest.approx(0.1) and made.train["learning_rate"] == 1e-4
    assert made.unused == []


# ---- what is trained ----


def test_settings_of_ragkit_come_through(make_fedrag, rows, quiet):
    rag = make_fedrag(top_k=2)
    config = LSRConfig(preset="fedrag", top_k=4)
    trainer = HuggingFaceTrainerForLSR(rag, [rows], quiet, config=config)
    assert trainer.config.top_k == 4 and trainer.config.gamma == 1.0  # theirs: no temperature
    assert trainer.config.direction == "KL(Q_LM||P_R)"
    assert trainer.config.train.max_steps == 2 and config.train.max_steps is None  # the given one stays as it was
    assert trainer.train().steps == 2
    assert HuggingFaceTrainerForLSR(rag, [rows], config=LSRConfig(beta=0.5)).config.top_k == 2
    own = HuggingFaceTrainerForRALT(rag, [rows], config=RALTConfig(train={"batch_size": 5}))
    assert own.config.method == "lora" and own.config.train.batch_size == 5 and own.config.top_k == 2
    with pytest.raises(TypeError, match="config: expected a ragkit.LSRConfig, found RALTConfig"):
        HuggingFaceTrainerForLSR(rag, [rows], config=RALTConfig())


def test_one_passage_cannot_teach_the_retriever(make_fedrag, rows):
    rag = make_fedrag(top_k=1)
    with pytest.raises(ConfigError, match="rag_config.top_k is 1, but LSR learns from how passages of one query"):
        HuggingFaceTrainerForLSR(rag, [rows])
    assert HuggingFaceTrainerForLSR(rag, [rows], config=LSRConfig(top_k=3)).config.top_k == 3
    assert HuggingFaceTrainerForRALT(rag, [rows]).config.top_k == 1


@pytest.mark.parametrize("kind", ["a list of one dict of lists", "rows", "Dataset", "DataFrame"])
def test_every_form_of_the_training_data(kind, make_fedrag, rows):
    as_rows = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    if kind == "Dataset":
        data = pytest.importorskip("datasets").Dataset.from_dict(rows)
    elif kind == "DataFrame":
        data = pytest.importorskip("pandas").DataFrame(rows)
    else:
        data = as_rows if kind == "rows" else [rows]
    trainer = HuggingFaceTrainerForRALT(make_fedrag(), data)
    assert [example.question for example in trainer.data] == rows["query"]
    assert [example.answer for example in trainer.data] == rows["response"]
    assert trainer.train_dataset is trainer.data and len(trainer.train_dataset) == 3
    assert len(trainer.rows()) == 6  # two passages for each
    assert trainer.rows()[0].response == " Lima</s>"


def test_ralt_trains_with_the_prompt_of_inference(make_fedrag, rows, quiet):
    rag = make_fedrag(prompt_template="{query}\n{context}\n<response>\n")
    trainer = HuggingFaceTrainerForRALT(rag, [rows], quiet)
    row = trainer.rows()[0]
    assert row.prompt.endswith("What is the capital of Peru?\nLima is the capital of Peru.\n<response>\n")
    assert row.response == "Lima</s>"


def test_ralt_trains_the_adapter_of_a_peft_model(make_fedrag, rows, quiet, adapter_folder, lm_folder, weights):
    plain = make_fedrag()
    rag = RAGSystem(
        generator=HFPeftModelGenerator(adapter_folder, lm_folder),
        retriever=plain.retriever,
        knowledge_store=plain.knowledge_store,
        rag_config=plain.rag_config,
    )
    trainer = HuggingFaceTrainerForRALT(rag, [rows], quiet)
    assert trainer.config.method == "lora"
    before = weights(trainer.model)
    trainer.train()
    moved = [name for name, tensor in trainer.model.state_dict().items() if not (tensor == before[name]).all()]
    assert moved and all("lora_" in name for name in moved)


def test_training_both_sides_refreshes_the_store(make_fedrag, rows, quiet, weights, same):
    rag = make_fedrag()
    other = make_fedrag(retriever=rag.retriever)
    other.core  # noqa: B018 - joined before the training
    encoder = rag.retriever.encoder
    before, embedding = weights(encoder), rag.retrieve("Peru?")[0].embedding
    config = LSRConfig(train_part="both", train={"max_steps": 2, "warmup_steps": 0, "learning_rate": 1e-3})
    config.output_dir = quiet.output_dir
    HuggingFaceTrainerForLSR(rag, [rows], config=config).train()
    assert not same(encoder, before) and rag.retriever.query_encoder is None
    top = rag.retrieve("Peru?")[0]
    assert top.embedding != embedding
    assert top.embedding == pytest.approx(rag.retriever.encode_context(top.text_content).tolist(), abs=1e-5)
    with pytest.warns(UserWarning, match="the passage encoder was trained since"):
        other.retrieve("Peru?")


def test_the_retriever_learns_what_helps(make_fedrag, quiet):
    """With a teacher that wants the second passage of each query, its score rises over that of the first."""
    rag = make_fedrag(top_k=2)
    query = "What is the capital of Peru?"
    first, second = (node.node_id for node in rag.retrieve(query))
    config = LSRConfig(train={"max_steps": 15, "learning_rate": 2e-4, "warmup_steps": 0})
    config.output_dir = quiet.output_dir
    trainer = HuggingFaceTrainerForLSR(rag, [{"query": query, "response": "Lima"}], config=config)
    trainer.teacher = lambda example, passages: [0.0 if p.id == first else 5.0 for p in passages]
    trainer.train()
    rag.rag_config.top_k = 4
    scores = {node.node_id: node.score for node in rag.retrieve(query)}
    assert scores[second] > scores[first]


# ---- evaluation ----


def test_evaluate_works(make_fedrag, rows, in_tmp):
    rag = make_fedrag()
    lsr = HuggingFaceTrainerForLSR(rag, [rows], eval_dataset=[rows])
    ralt = HuggingFaceTrainerForRALT(rag, [rows])
    found = lsr.evaluate()
    assert set(found.metrics) == {"em", "f1"} and found.metrics["em"].n == 3  # no row names its passages
    supported = [{"query": "What is the capital of Peru?", "response": "Lima", "supporting": ["Peru"]}]
    assert lsr.evaluate(supported).metrics["recall@1"].mean == 1.0 and lsr.evaluate(supported).predictions is None
    assert {"em", "recall@1"} <= set(ralt.evaluate(supported).metrics)
    with pytest.raises(DataError, match=r"HuggingFaceTrainerForRALT\(..., eval_dataset=...\) or trainer.evaluate"):
        ralt.evaluate()
    zeros = ralt.evaluate([{"query": "q", "response": "never said"}, {"query": "r", "response": "nor this"}])
    assert zeros["em"] == 0.0 and zeros.metrics["em"].n == 2


# ---- arguments and the manager ----


def test_unknown_arguments_are_told_their_place(make_fedrag, rows):
    rag = make_fedrag()
    for kind, given, message in [
        (
            HuggingFaceTrainerForLSR,
            {"learning_rate": 123},
            r"it goes into training_arguments=TrainingArg",
        ),
        (HuggingFaceTrainerForLSR, {"temperature": 0.1}, r"there are two: config=LSRConfig\(gamma="),
        (HuggingFaceTrainerForLSR, {"nonsense": 1}, "it takes rag_system, train_dataset, training_arguments"),
        (HuggingFaceTrainerForLSR, {"loss": "x"}, r"it is set by config=LSRConfig\(gamma"),
        (HuggingFaceTrainerForRALT, {"data_collator": "x"}, "the generator's prompt_template sets the prompt"),
        (HuggingFaceTrainerForRALT, {"training_argument": None}, "did you mean 'training_arguments'"),
        (HuggingFaceTrainerForRALT, {"lora_r": 4}, r"config=RALTConfig\(lora_r=...\)"),
    ]:
        with pytest.raises(TypeError, match=f"{kind.__name__}: unknown argument .*{message}"):
            kind(rag, [rows], **given)
    with pytest.raises(AttributeError, match="hf_trainer_obj: the transformers.Trainer is made when train"):
        HuggingFaceTrainerForLSR(rag, [rows]).hf_trainer_obj  # noqa: B018
    with pytest.raises(TypeError, match="rag_system: expected a RAGSystem, found NoneType"):
        HuggingFaceTrainerForLSR(None, [rows])
    with pytest.raises(DataError, match="no column for the answer"):
        HuggingFaceTrainerForLSR(rag, [{"query": "x", "reply": "y"}])


def test_manager_contract(make_fedrag, rows):
    rag = make_fedrag()
    lsr, ralt = HuggingFaceTrainerForLSR(rag, [rows]), HuggingFaceTrainerForRALT(rag, [rows])
    assert HuggingFaceTrainerManager is HuggingFaceRAGTrainerManager
    with pytest.raises(ValueError, match="mode: found 'retriver', expected 'retriever' or 'generator'; did you mean"):
        HuggingFaceRAGTrainerManager(mode="retriver", retriever_trainer=lsr)
    with pytest.raises(ValueError, match="mode 'retriever' needs retriever_trainer"):
        HuggingFaceRAGTrainerManager(mode="retriever", generator_trainer=ralt)
    with pytest.raises(ValueError, match="mode 'generator' needs generator_trainer"):
        HuggingFaceRAGTrainerManager(mode=RAGTrainMode.GENERATOR, retriever_trainer=lsr)
    other = HuggingFaceTrainerForRALT(make_fedrag(), [rows])
    with pytest.raises(ValueError, match="two different RAG systems"):
        HuggingFaceRAGTrainerManager(mode="retriever", retriever_trainer=lsr, generator_trainer=other)
    with pytest.raises(TypeError, match="unknown argument 'rag_system' .*its trainers hold it already; leave it out"):
        HuggingFaceRAGTrainerManager(mode="retriever", retriever_trainer=lsr, rag_system=rag)
    manager = HuggingFaceRAGTrainerManager("retriever", lsr, ralt)
    assert manager.system is rag.core and manager.model is rag.retriever.encoder
    manager.mode = RAGTrainMode.GENERATOR
    assert manager.model is rag.generator.model
    manager.mode = "retriever"
    assert manager.model is rag.retriever.encoder


# ---- federated ----


@pytest.mark.parametrize("mode", ["retriever", "generator"])
def test_the_federated_task_trains_what_it_is_given(mode, make_fedrag, rows, quiet, weights, same):
    pytest.importorskip("flwr")
    rag = make_fedrag()
    lsr, ralt = HuggingFaceTrainerForLSR(rag, [rows], quiet), HuggingFaceTrainerForRALT(rag, [rows], quiet)
    manager = HuggingFaceRAGTrainerManager(mode=mode, retriever_trainer=lsr, generator_trainer=ralt)
    task = manager.get_federated_task(rounds=1, local_steps=1)
    model, frozen = manager.model, rag.generator.model if mode == "retriever" else rag.retriever.encoder
    before, untouched = weights(model), weights(frozen)
    result = task.simulate(num_clients=2)
    each = 1 if mode == "retriever" else 2  # RALT: an instance for each of two passages
    assert sorted(result.clients.values()) == [each, 2 * each]  # three questions, dealt to two clients
    assert result.loss > 0 and not result.failures
    assert manager.model is model and not same(model, before) and same(frozen, untouched)
    held = model.state_dict()
    for name, tensor in result.weights.items():  # the system holds the common weights
        matching = [key for key in held if name.endswith(key) or key.endswith(name)]
        assert len(matching) == 1 and torch.equal(held[matching[0]].cpu(), tensor.cpu())


def test_flowers_first_api_is_told_apart(make_fedrag, rows):
    rag = make_fedrag()
    manager = HuggingFaceRAGTrainerManager(mode="retriever", retriever_trainer=HuggingFaceTrainerForLSR(rag, [rows]))
    task = manager.get_federated_task()
    for side, call in [("server", task.server), ("client", task.client)]:
        with pytest.raises(RuntimeError, match=rf"fl_task.{side}\(...\) belongs .*simulate\(.*apps.{side}_app\(build"):
            call(model=manager.model, train_dataset=rows)
    with pytest.raises(RuntimeError, match="here a task is made from the trainers themselves: .*simulate.num_clients"):
        HuggingFaceFLTask.from_trainer_and_tester(trainer=print, tester=print)
    with pytest.raises(ConfigError, match='unknown key "round" .*did you mean "rounds"'):
        manager.get_federated_task(round=3)
