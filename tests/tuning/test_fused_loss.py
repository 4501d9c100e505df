"""The loss without logits against the model's own: value, gradients, a whole training, and what is allocated."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import warnings
from pathlib import Path

import pytest
import torch
from launching import TORCHRUN
from silence import no_warning
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from ragkit.config import ConfigError, RALTConfig
from ragkit.engine import NonFiniteLossError
from ragkit.rag.scoring import ScoringError
from ragkit.rag.system import RAGSystem
from ragkit.tuning.fused_loss import packing_works, training_loss
from ragkit.tuning.lora import add_adapter
from ragkit.tuning.ralt import RALTTrainer
from ragkit.tuning.ralt_rows import Collator, RALTRow, packed

SMALL = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}


def llama(**changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, **changes}))


def gemma():
    torch.manual_seed(0)
    return GemmaForCausalLM(GemmaConfig(**SMALL, head_dim=8))  # tied


def granite():
    torch.manual_seed(0)
    return GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=3.0))


def gpt2():
    torch.manual_seed(0)
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    size = {"vocab_size": 97, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**size, **no_dropout, initializer_range=0.3, bos_token_id=1, eos_token_id=2))


MODELS = {
    "llama": llama,
    "llama tied": lambda: llama(tie_word_embeddings=True),
    "gemma": gemma,
    "granite": granite,
    "gpt2": gpt2,
}


def instance(number, prompt, response, weight=1.0):
    draw = torch.Generator().manual_seed(number)
    ids = [tuple(torch.randint(3, 97, (n,), generator=draw).tolist()) for n in (prompt, response)]
    return RALTRow(f"q{number}", "?", (), *ids, "", "", weight)


ROWS = [instance(0, 5, 3), instance(1, 9, 1), instance(2, 2, 6), instance(3, 7, 2)]


def batch_of(rows, pack=None):
    return {k: v for k, v in Collator(0, pack)(rows).items() if k != "ids"}


def gradients(model, batch, **more):
    model.zero_grad()
    loss = model(**batch, **more).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(found, wanted, rtol=1e-4):
    assert found[0].item() == pytest.approx(wanted[0].item(), abs=1e-5)
    assert found[1].keys() == wanted[1].keys() and found[1]
    for name, grad in wanted[1].items():
        torch.testing.assert_close(found[1][name], grad, rtol=rtol, atol=1e-5 * max(1, float(grad.abs().max())))


@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_gradients_are_the_models_own(kind):
    model, batch = MODELS[kind]().train(), batch_of(ROWS)
    model.config.use_cache = False
    for more in ({}, {"num_items_in_batch": torch.tensor(30)}):  # alone, and as one of several accumulated batches
        wanted = gradients(model, batch, **more)
        with training_loss(model) as fused:
            assert fused and model(**batch).logits is None
            found = gradients(model, batch, **more)
            assert model(input_ids=batch["input_ids"]).logits.shape[-1] == 97  # without labels as before
        close(found, wanted)
    assert "forward" not in model.__dict__ and model(**batch).logits is not None


class Allocations(TorchDispatchMode):
    """The size of the largest tensor that an operator makes, inside other operators too; views of weights are none."""

    def __init__(self, model):
        super().__init__()
        self.largest, self.known = 0, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("adapter", [False, True])
def test_no_tensor_of_all_logits_is_made(adapter):
    model = llama(vocab_size=20_000, hidden_size=64).train()
    if adapter:
        model = add_adapter(model, RALTConfig()).train()
    batch = batch_of([instance(n, 40, 6) for n in range(4)])
    logits, head = batch["input_ids"].numel() * 20_000, 20_000 * 64
    with Allocations(model) as own:
        model(**batch).loss.backward()
    assert own.largest >= logits
    model.zero_grad()
    with training_loss(model), Allocations(model) as ours:
        model(**batch).loss.backward()
    # 24 labels. A head that is trained has a gradient of its own size, a frozen one has none.
    assert ours.largest <= 24 * 20_000 < head if adapter else ours.largest == head < logits / 2


def test_a_frozen_head_gets_no_gradient_and_adapters_get_theirs(system, questions, tmp_path):
    model = add_adapter(system.generator.model, RALTConfig()).train()
    rows = RALTTrainer(system, questions, RALTConfig()).rows()[:4]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    wanted = gradients(model, batch_of(rows))
    with training_loss(model) as fused:
        assert fused
        found = gradients(model, batch_of(rows))
    close(found, wanted)
    assert all("lora_" in name for name in found[1])


def test_weights_multiply_what_an_instance_adds():
    weights = (0.5, 1.5, 2.0, 0.0)
    rows = [instance(n, 4 + n, 2 + n, weight) for n, weight in enumerate(weights)]
    model = llama().eval()
    batch = batch_of(rows)
    count = sum(len(row.response_ids) for row in rows)
    with torch.no_grad():
        parts = [float(model(**batch_of([instance(n, 4 + n, 2 + n)])).loss) * (2 + n) for n in range(4)]
        wanted = sum(w * part for w, part in zip(weights, parts, strict=True)) / count
        for fused in (True, False):
            with training_loss(model, fused, weighted=True):
                assert float(model(**batch).loss) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "granite"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_give_the_loss_of_padded_ones(kind, attention):
    model = MODELS[kind]().train()
    model.set_attn_implementation(attention)
    model.config.use_cache = False
    assert packing_works(model)
    wanted = gradients(model, batch_of(ROWS))
    batch = batch_of(ROWS, pack=18)
    assert batch["input_ids"].shape == (2, 18) and "attention_mask" not in batch
    assert batch["position_ids"][0].tolist() == [*range(10), *range(8)]
    close(gradients(model, batch), wanted)
    with training_loss(model):
        close(gradients(model, batch), wanted)


def test_packing_is_refused_where_instances_would_see_each_other(system, questions):
    model = llama()
    whole = model.model.forward
    model.model.forward = lambda *a, position_ids=None, **k: whole(*a, **k)  # as a model that knows no packing
    assert not packing_works(model)
    system.generator.model = model
    config = RALTConfig(packing=True, method="full", output_dir="nowhere")
    trainer = RALTTrainer(system, questions, config)
    rows = trainer.rows()[:2]
    system.generator.core.resize_token_embeddings(len(system.generator.tokenizer))
    with pytest.raises(ConfigError, match="packing: in LlamaForCausalLM with attention 'sdpa' instances of one row"):
        trainer._check_model(rows)


def test_bins_hold_what_fits():
    rows = [instance(n, length - 1, 1) for n, length in enumerate((5, 9, 3, 4, 12, 1))]
    assert [[len(row) for row in held] for held in packed(rows, 10)] == [[12], [9, 1], [5, 4], [3]]
    assert packed(rows, 10) == packed(rows, 10)


def test_a_head_that_is_not_known_falls_back_with_one_message(system, questions, tmp_path):
    class Doubled(LlamaForCausalLM):
        def forward(self, *args, labels=None, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 2  # what no configuration says
            if labels is not None:
                out.loss = self.loss_function(out.logits, labels, self.config.vocab_size, **{
                    k: v for k, v in kwargs.items() if k == "num_items_in_batch"})  # fmt: skip
            return out

    torch.manual_seed(0)
    model = Doubled(LlamaConfig(**SMALL))
    batch = batch_of(ROWS)
    wanted = float(model(**batch).loss.detach())
    with pytest.warns(UserWarning, match="Doubled: its logits are not"), training_loss(model) as fused:
        assert not fused and float(model(**batch).loss) == pytest.approx(wanted)
    with no_warning():
        with training_loss(model, weighted=True):  # said once
            assert float(model(**batch, loss_weights=torch.ones_like(batch["labels"])).loss) == pytest.approx(wanted)


def test_a_loss_that_is_more_than_its_labels_stays_the_models_own():
    torch.manual_seed(0)
    sizes = {**SMALL, "num_local_experts": 4, "router_aux_loss_coef": 0.02}
    model, batch = MixtralForCausalLM(MixtralConfig(**sizes, output_router_logits=True)).train(), batch_of(ROWS)
    wanted = gradients(model, batch)
    with (
        pytest.warns(UserWarning, match="Mixtral.* own loss is more than the cross-entropy"),
        training_loss(model) as f,
    ):
        assert not f
        close(gradients(model, batch), wanted)
    with pytest.raises(ConfigError, match="passage_weights: Mixtral"), training_loss(model, weighted=True):
        pass
    model.config.output_router_logits = False  # then there is nothing else, and experts are no obstacle
    wanted = gradients(model, batch)
    with training_loss(model) as fused:
        assert fused
        close(gradients(model, batch), wanted)


def test_in_mixed_precision_it_is_nearer_to_the_exact_loss_than_the_models_own():
    model, batch = llama().train(), batch_of(ROWS)
    exact = gradients(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        own = gradients(model, batch)
        with training_loss(model) as fused:
            assert fused
            found = gradients(model, batch)
    assert found[0] == pytest.approx(float(own[0]), rel=1e-2)

    def error(one):
        return sum(float((one[1][name] - grad).square().sum()) for name, grad in exact[1].items()) ** 0.5

    assert abs(found[0] - exact[0]) <= 1.1 * abs(own[0] - exact[0]) + 1e-4
    assert found[1].keys() == exact[1].keys() and error(found) <= 1.2 * error(own)
    assert all(grad.dtype == torch.float32 for grad in found[1].values())


# ---- whole trainings ----


def curve(system, questions, folder, **changes):
    train = {"batch_size": 3, "learning_rate": 5e-3, "max_steps": 5, "warmup_steps": 0, **changes.pop("train", {})}
    config = RALTConfig(**{"top_k": 2, "output_dir": str(folder), "train": train, **changes})
    result = RALTTrainer(system, questions, config).train()
    return [event["loss"] for event in result.history if event.get("loss") is not None]


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "lora"},
        {"method": "dora", "lora_rslora": True},
        {"method": "full", "train": {"gradient_accumulation_steps": 3}},
        {"method": "full", "train": {"gradient_checkpointing": True}},
        {"method": "lora", "passage_weights": "retrieval"},
        {"method": "lora", "packing": True},
    ],
    ids=lambda c: " ".join(f"{k}={v}" for k, v in c.items()),
)
def test_a_training_has_the_curve_of_the_models_own_loss(make_system, questions, tmp_path, changes):
    # Answers of unequal length, so that the mean over accumulated batches is not the mean of their means.
    longer = [{**q, "answer": " ".join([q["answer"]] * (1 + n % 4))} for n, q in enumerate(questions)]
    wanted = curve(make_system(), longer, tmp_path, **copy.deepcopy(changes), fused_loss=False)
    found = curve(make_system(), longer, tmp_path, **copy.deepcopy(changes))
    assert len(found) == 5 and found == pytest.approx(wanted, abs=2e-4)
    assert found[0] == pytest.approx(wanted[0], abs=1e-5) and len(set(found)) == 5
    if changes.get("packing"):
        padded = curve(make_system(), longer, tmp_path, method="lora", packing=False)
        assert found == pytest.approx(padded, abs=2e-4)
    if "passage_weights" in changes:
        alike = curve(make_system(), longer, tmp_path, method="lora")
        assert abs(found[0] - alike[0]) > 1e-3


def test_dora_is_trained_saved_and_loaded_and_is_no_lora(make_system, questions, tmp_path):
    system = make_system()
    curve(system, questions, tmp_path, method="dora")
    lengths = {n: p for n, p in system.generator.model.named_parameters() if "magnitude" in n}
    fresh = add_adapter(make_system().generator.model, RALTConfig(method="dora"))
    begun = dict(fresh.named_parameters())
    assert lengths and all(not torch.equal(p, begun[n]) for n, p in lengths.items())
    system.save(tmp_path / "system")
    asked = [question["question"] for question in questions]
    loaded = RAGSystem.load(tmp_path / "system", device="cpu")
    assert [a.text for a in loaded.batch_query(asked)] == [a.text for a in system.batch_query(asked)]
    assert any("magnitude" in name for name, _ in loaded.generator.model.named_parameters())
    curve(loaded, questions, tmp_path, method="dora")  # trained on
    lora = make_system()
    curve(lora, questions, tmp_path, method="lora")
    with pytest.raises(ConfigError, match='method: found "dora", but the generator carries an adapter without it'):
        curve(lora, questions, tmp_path, method="dora")


def test_mixed_precision_keeps_the_model_as_it_was(system, questions, tmp_path):
    found = curve(system, questions, tmp_path, method="full", train={"precision": "bf16"})
    assert all(0 < loss < 20 for loss in found)
    model = system.generator.model
    assert model(torch.tensor([[1, 5]])).logits.dtype == torch.float32


def test_logits_that_are_no_numbers_end_the_training(system, questions, tmp_path):
    with torch.no_grad():
        system.generator.model.lm_head.weight[7] = float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the head cannot be tried out either
        with pytest.raises(NonFiniteLossError, match="the loss is nan at step 1 in the batch of the questions q-"):
            curve(system, questions, tmp_path, method="full")


def test_tokens_that_the_head_lacks_are_named_before_anything_is_trained(system, questions, tmp_path):
    system.generator.tokenizer = copy.deepcopy(system.generator.tokenizer)
    assert system.generator.tokenizer.add_tokens(["zqzq"]) == 1
    new = [*questions[:6], {**questions[6], "answer": "zqzq"}]
    for method in ("full", "lora"):
        with pytest.raises(ScoringError, match=rf"question '{questions[6]['id']}'.*resize_token_embeddings"):
            curve(system, new, tmp_path, method=method)
    assert not list(tmp_path.iterdir()) and not hasattr(system.generator.model, "peft_config")  # nothing was begun
    system.generator.model.resize_token_embeddings(len(system.generator.tokenizer))
    assert len(curve(system, new, tmp_path, method="full")) == 5


def test_weights_of_instances_add_up_to_their_number(system, questions):
    config = RALTConfig(passage_weights="retrieval", top_k=3)
    rows = RALTTrainer(system, questions, config).rows()
    by_question: dict[str, list[float]] = {}
    for row in rows:
        by_question.setdefault(row.id, []).append(row.weight)
    assert all(sum(weights) == pytest.approx(3) for weights in by_question.values())
    assert all(weights == sorted(weights, reverse=True) and weights[0] > 1.05 for weights in by_question.values())
    assert "weight" in repr(rows[0]) and "<mark>" in rows[0]._repr_html_() and "&lt;s&gt;" in rows[0]._repr_html_()
    with pytest.raises(ConfigError, match='passage_weights: found "retrieval"'):
        RALTTrainer(system, questions, RALTConfig(passage_weights="retrieval", context="joined"))


JOB = """
import json, sys
import torch
from ragkit import RAGSystem, RALTConfig, RALTTrainer, processes
from ragkit.runs import Run
folder, config = sys.argv[1], RALTConfig(**json.loads(sys.argv[2]))
torch.set_num_threads(1)
processes.join("cpu")
system = RAGSystem.load(f"{folder}/system", device="cpu")
trainer = RALTTrainer(system, f"{folder}/questions.json", config)
trainer.run = processes.shared_run(lambda: Run.create(config, config.output_dir, config.name))
trainer.train()
processes.leave()
"""


@pytest.mark.slow
def test_two_processes_have_the_curve_of_one_with_twice_the_batch(system, questions, tmp_path):
    system.save(tmp_path / "system")
    longer = [{**q, "answer": " ".join([q["answer"]] * (1 + n % 4))} for n, q in enumerate(questions)]
    (tmp_path / "questions.json").write_text(json.dumps(longer))
    (tmp_path / "job.py").write_text(JOB)
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    train = {"batch_size": 3, "max_steps": 3, "learning_rate": 5e-3, "warmup_steps": 0}
    config = {"output_dir": str(tmp_path), "name": "run", "top_k": 2, "method": "lora", "train": train}
    command = [*TORCHRUN, str(tmp_path / "job.py"), str(tmp_path), json.dumps(config)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    found = [event["loss"] for event in events if event.get("loss") is not None]
    wanted = curve(system, longer, tmp_path, method="lora", train={**train, "batch_size": 6})
    assert len(found) == 3 and found == pytest.approx(wanted, abs=1e-5)
