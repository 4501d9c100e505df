"""A generator's folder: saved by name or with its weights, loaded the same, and what it says to a damaged one."""

from __future__ import annotations

import json

import pytest
import torch

from ragkit.rag.generator import Generator


def test_from_a_folder_and_saved_again(generator, pairs, tmp_path):
    generator.model.save_pretrained(tmp_path / "lm")
    generator.tokenizer.save_pretrained(tmp_path / "lm")
    loaded = Generator(tmp_path / "lm", device="cpu", max_new_tokens=8, batch_size=3, max_prompt_tokens=99)
    assert loaded.generate_ids(pairs[0]) == generator.generate_ids(pairs[0])
    loaded.save(tmp_path / "g")  # the folder may not exist elsewhere, so the weights are in
    assert (tmp_path / "g" / "model" / "model.safetensors").is_file()
    again = Generator.load(tmp_path / "g", device="cpu")
    assert again.generate_ids(pairs[0]) == generator.generate_ids(pairs[0])
    assert (again.max_new_tokens, again.batch_size, again.max_prompt_tokens) == (8, 3, 99)


@pytest.mark.parametrize("how", ["renamed", "relative path"])
def test_a_model_from_a_folder_that_is_no_longer_there_is_saved_with_its_weights(
    generator, pairs, tmp_path, monkeypatch, how
):
    generator.model.save_pretrained(tmp_path / "lm")
    generator.tokenizer.save_pretrained(tmp_path / "lm")
    monkeypatch.chdir(tmp_path)
    loaded = Generator("lm" if how == "relative path" else tmp_path / "lm", device="cpu", max_new_tokens=8)
    (tmp_path / "elsewhere").mkdir()
    if how == "renamed":
        (tmp_path / "lm").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "elsewhere")
    loaded.save(tmp_path / "g")
    again = Generator.load(tmp_path / "g", device="cpu")
    assert again.generate_ids(pairs[0]) == generator.generate_ids(pairs[0])


@pytest.fixture
def named(generator, tmp_path, monkeypatch):
    """A generator called "default" as the shipped one is, with the tiny LM in its place."""
    from ragkit import small_world

    generator.model.save_pretrained(tmp_path / "shipped")
    generator.tokenizer.save_pretrained(tmp_path / "shipped")
    monkeypatch.setattr(small_world, "lm_path", lambda: tmp_path / "shipped")
    return Generator("default", device="cpu", max_new_tokens=8)


def test_an_untouched_named_model_is_kept_as_its_name(named, pairs, tmp_path):
    named.save(tmp_path / "g")
    assert not (tmp_path / "g" / "model").exists()
    assert Generator.load(tmp_path / "g", device="cpu").generate_ids(pairs[0]) == named.generate_ids(pairs[0])
    with torch.no_grad():
        named.model.model.norm.weight.add_(0.01)
    named.save(tmp_path / "g2")
    assert (tmp_path / "g2" / "model").is_dir()
    named.model.save_pretrained(tmp_path / "shipped")  # "default" now means something else
    with pytest.raises(ValueError, match="the model 'default' is not the one that was saved"):
        Generator.load(tmp_path / "g", device="cpu")


@pytest.mark.parametrize("over", [{}, {"modules_to_save": ["lm_head"]}])
@pytest.mark.parametrize("base_trained", [False, True])
def test_adapters_are_saved_with_or_without_their_base(
    named, pairs, tmp_path, over, base_trained, hf_logprob, add_lora
):
    if base_trained:
        with torch.no_grad():
            named.model.model.layers[0].mlp.up_proj.weight.add_(0.05)
    plain = named.sequence_logprob(*pairs)
    adapted = Generator(add_lora(named.model, **over), named.tokenizer)
    adapted.source, adapted._loaded = named.source, named._loaded
    adapted.save(tmp_path / "g")
    assert (tmp_path / "g" / "model").exists() == base_trained
    loaded = Generator.load(tmp_path / "g", device="cpu")
    assert torch.allclose(loaded.sequence_logprob(*pairs), adapted.sequence_logprob(*pairs), atol=1e-4)
    with loaded.model.disable_adapter():
        base = [hf_logprob(loaded.model, p, r) for p, r in zip(*pairs, strict=True)]
    assert plain.tolist() == pytest.approx(base, abs=1e-4)
    adapted.model.save_pretrained(tmp_path / "adapter")
    if not base_trained:
        other = Generator("default", adapter=tmp_path / "adapter", device="cpu")
        assert torch.allclose(other.sequence_logprob(*pairs), adapted.sequence_logprob(*pairs), atol=1e-4)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "generator.json").unlink(), "generator.json: not a saved generator"),
        (lambda d: (d / "generator.json").write_text("{"), "generator.json: not a saved generator"),
        (lambda d: (d / "generator.json").write_text(json.dumps([])), "generator.json: not a saved generator"),
        (lambda d: (d / "model").rename(d / "gone"), "model: missing"),
        (lambda d: (d / "model" / "model.safetensors").write_bytes(b"half"), "no language model could be loaded"),
    ],
)
def test_a_damaged_folder_is_named(generator, tmp_path, damage, message):
    generator.save(tmp_path / "g")
    damage(tmp_path / "g")
    with pytest.raises(ValueError, match=message) as caught:
        Generator.load(tmp_path / "g", device="cpu")
    assert str(tmp_path / "g") in str(caught.value)


def test_a_wrong_name_or_adapter_is_named(generator, tmp_path):
    with pytest.raises(ValueError, match="no language model could be loaded from .*nothing"):
        Generator(tmp_path / "nothing")
    with pytest.raises(ValueError, match="no PEFT adapter could be loaded from .*nothing"):
        Generator(generator.model, generator.tokenizer, adapter=tmp_path / "nothing")
    with pytest.raises(ValueError, match="unknown dtype 'float8'"):
        Generator(tmp_path / "nothing", dtype="float8")


def test_dtype(generator, tmp_path):
    generator.model.save_pretrained(tmp_path / "lm")
    generator.tokenizer.save_pretrained(tmp_path / "lm")
    assert Generator(tmp_path / "lm", device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16
