"""Checkpoints of GFM-RAG and ours: round trips, both generations of the config, and everything that can be wrong."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections import OrderedDict

import pytest
import torch

from ragkit.gfm import (
    CheckpointError,
    GFMSettings,
    GNNRetriever,
    QueryGNN,
    as_link_predictor,
    as_retriever,
    export_v1,
    load_gfm,
    save_gfm,
)

KINDS = [
    {},
    {"hidden_dims": [4, 4, 3], "concat_hidden": True},
    {"num_mlp_layer": 1},
    {"num_mlp_layer": 3, "layer_norm": False},
    {"aggregate_func": "pna", "message_func": "transe", "short_cut": False},
]


def tiny(cls=GNNRetriever, **kinds):
    return cls(GFMSettings(**{"rel_emb_dim": 6, "input_dim": 4, "hidden_dims": [4, 4], **kinds}))


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def folder(tmp_path):
    """folder(state, **config changes): a checkpoint as GFM-RAG v1 writes it, whatever `state` is."""

    def write(state, kinds=(), **changes):
        inner = {
            "_target_": "gfmrag.ultra.models.QueryNBFNet",
            "input_dim": 4,
            "hidden_dims": [4, 4],
            "message_func": "distmult",
            "aggregate_func": "sum",
            "short_cut": True,
            "layer_norm": True,
            **dict(kinds),
        }
        config = {
            "text_emb_model_config": {"_target_": "x", "text_emb_model_name": "mpnet", "normalize": False},
            "model_config": {"_target_": "gfmrag.models.GNNRetriever", "entity_model": inner, "rel_emb_dim": 6},
            **changes,
        }
        (tmp_path / "config.json").write_text(json.dumps(config))
        if state is not None:
            torch.save(state, tmp_path / "model.pth")
        return tmp_path

    return write


# ---- what loads ----


@pytest.mark.parametrize("cls", [GNNRetriever, QueryGNN])
@pytest.mark.parametrize("kinds", KINDS, ids=str)
def test_round_trips_in_both_formats(tmp_path, cls, kinds):
    model = tiny(cls, **kinds)
    for number, write in enumerate((save_gfm, export_v1)):
        path = write(model, tmp_path / str(number), encoder="some/encoder")
        before = torch.get_rng_state()
        loaded = load_gfm(path)
        assert torch.equal(torch.get_rng_state(), before)
        assert type(loaded) is cls and loaded.settings == model.settings and not loaded.training
        same(loaded, model)
        assert all(p.requires_grad and p.device.type == "cpu" for p in loaded.parameters())
        assert loaded.encoder_info["text_emb_model_name"] == "some/encoder"
        write(loaded, tmp_path / str(number))  # over the old one; the encoder is kept
        assert load_gfm(path).encoder_info["text_emb_model_name"] == "some/encoder"
        same(load_gfm(next(path.glob("model.*"))), model)
    assert sorted(file.name for file in tmp_path.rglob("*")) == [
        *("0", "1", "config.json", "config.json", "model.pth", "model.safetensors")
    ]


def test_export_is_what_v1_reads(tmp_path):
    model = tiny()
    path = export_v1(model, tmp_path / "out", encoder="sentence-transformers/all-mpnet-base-v2")
    state = torch.load(path / "model.pth", weights_only=True)["model"]
    assert set(state) == {
        *(f"{part}.{kind}" for part in ("rel_mlp", "question_mlp") for kind in ("weight", "bias")),
        *(
            f"entity_model.layers.{i}.{part}.{kind}"
            for i in range(2)
            for part in ("linear", "layer_norm", "relation_projection.0", "relation_projection.2")
            for kind in ("weight", "bias")
        ),
        *(f"entity_model.mlp.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")),
    }
    config = json.loads((path / "config.json").read_text())
    assert config["model_config"] == {
        "_target_": "gfmrag.models.GNNRetriever",
        "entity_model": {
            "_target_": "gfmrag.ultra.models.QueryNBFNet",
            "input_dim": 4,
            "hidden_dims": [4, 4],
            "message_func": "distmult",
            "aggregate_func": "sum",
            "short_cut": True,
            "layer_norm": True,
        },
        "rel_emb_dim": 6,
    }
    text = config["text_emb_model_config"]
    assert text["_target_"] == "gfmrag.text_emb_models.BaseTextEmbModel"
    assert set(text) == {
        *("_target_", "text_emb_model_name", "normalize", "batch_size", "query_instruct", "passage_instruct"),
        "model_kwargs",
    }
    with pytest.warns(UserWarning, match="no text encoder is named"):
        export_v1(model, tmp_path / "nameless")


def test_the_published_size_has_v1s_number_of_parameters():
    with torch.device("meta"):
        retriever, link = GNNRetriever(GFMSettings()), QueryGNN(GFMSettings())
    assert sum(p.numel() for p in retriever.parameters()) == 8_144_897
    assert sum(p.numel() for p in link.parameters()) == 7_751_169
    assert len(retriever.state_dict()) == 56


def test_every_shape_of_v1_file_and_config(folder):
    model = tiny()
    state = model.state_dict()
    prefixed = OrderedDict((f"module.{name}", tensor) for name, tensor in state.items())
    optimizer = torch.optim.AdamW(model.parameters()).state_dict()
    for content in (state, prefixed, {"model": state}, {"model": prefixed, "optimizer": optimizer, "epoch": 3}):
        same(load_gfm(folder(content)), model)
    inner = json.loads((folder({"model": state}) / "config.json").read_text())["model_config"]["entity_model"]
    for changes in (
        {"model_config": {"_target_": "elsewhere.GNN", "entity_model": inner, "feat_dim": 6, "ranker": {"k": 1}}},
        {"model_config": None, "model": {"entity_model": inner, "rel_emb_dim": 6}},
        {"model_config": None, "cfg": {"a": {"b": {"entity_model": inner}}}},
        {"model_config": None, "entity_model": inner},
    ):
        same(load_gfm(folder({"model": state}, **changes)), model)
    assert load_gfm(folder(state)).encoder_info == {"text_emb_model_name": "mpnet", "normalize": False}


def test_shapes_decide_and_the_config_is_asked_for_the_rest(folder):
    model = tiny(message_func="transe", aggregate_func="mean", short_cut=False)
    kinds = {"message_func": "transe", "aggregate_func": "mean", "short_cut": False}
    wrong = {**kinds, "input_dim": 8, "hidden_dims": [8], "layer_norm": False}
    with pytest.warns(UserWarning, match=r"config.json says .*input_dim 8, the tensors 4.*the tensors decide"):
        loaded = load_gfm(folder(model.state_dict(), wrong))
    assert loaded.settings == model.settings
    same(loaded, model)
    silent = {"message_func": None, "aggregate_func": None, "short_cut": None}
    loaded = load_gfm(folder(model.state_dict(), silent))  # GFM-RAG's own defaults
    assert (loaded.settings.message_func, loaded.settings.aggregate_func) == ("distmult", "sum")
    assert loaded.settings.short_cut is False


def test_hand_over_from_pre_training_and_back(tmp_path, capsys):
    pretrained = tiny(QueryGNN)
    export_v1(pretrained, tmp_path / "m", encoder="e")
    retriever = load_gfm(tmp_path / "m", kind="retriever")
    assert retriever.new_parameters == ["question_mlp.weight", "question_mlp.bias"]
    assert "new (random) parameters" in capsys.readouterr().out
    same(as_link_predictor(retriever), pretrained)
    assert retriever.encoder_info == load_gfm(tmp_path / "m").encoder_info
    save_gfm(retriever, tmp_path / "r")
    same(load_gfm(tmp_path / "r", kind="link_prediction"), pretrained)
    assert load_gfm(tmp_path / "r", kind="retriever").new_parameters == []
    twin = as_retriever(pretrained)
    twin.rel_mlp.weight.data.add_(1)
    assert not torch.equal(twin.rel_mlp.weight, pretrained.rel_mlp.weight)


def test_golden_weights_survive_both_formats(golden, tmp_path):
    case = golden("distmult_pna")
    for write in (save_gfm, export_v1):
        loaded = load_gfm(write(case.model, tmp_path / "m", encoder="e"))
        assert torch.equal(loaded(case.graph, *case.inputs), case.model(case.graph, *case.inputs))


# ---- what does not ----


def refused(path, message):
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        load_gfm(path)
    return caught.value


class Trap:
    """Unpickling this makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("shape", ["model", "beside", "in the state", "bare pickle"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_malicious_pickle_is_not_run(folder, tmp_path, shape):
    sprung = str(tmp_path / "sprung")
    state, trap = tiny().state_dict(), Trap(sprung)
    content = {"model": trap, "beside": {"model": state, "epoch": trap}, "in the state": {**state, "x": trap}}
    path = folder(content.get(shape))
    if shape == "bare pickle":
        (path / "model.pth").write_bytes(pickle.dumps({"model": trap}))
    refused(path, "nothing in it was run" if shape == "bare pickle" else "holds more than tensors")
    assert not os.path.exists(sprung)
    pickle.loads(pickle.dumps(trap)).close()
    assert os.path.exists(sprung)  # the trap works where it is stepped on


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.99])
def test_truncated_files(folder, tmp_path, part):
    path = folder({"model": tiny().state_dict()})
    content = (path / "model.pth").read_bytes()
    (path / "model.pth").write_bytes(content[: int(len(content) * part)])
    refused(path, "model.pth")
    ours = save_gfm(tiny(), tmp_path / "ours")
    content = (ours / "model.safetensors").read_bytes()
    (ours / "model.safetensors").write_bytes(content[: int(len(content) * part)])
    refused(ours, "cut short or damaged")


def test_each_tensor_that_does_not_fit_is_listed(folder):
    state = tiny().state_dict()
    del state["rel_mlp.bias"], state["entity_model.layers.0.layer_norm.weight"]
    state["entity_model.layers.1.linear.weight"] = torch.zeros(4, 9)
    state["extra"] = torch.zeros(2)
    error = refused(folder({"model": state}), "its tensors are not those of a GNNRetriever")
    assert error.missing == ["rel_mlp.bias", "entity_model.layers.0.layer_norm.weight"]
    assert error.unexpected == ["extra"]
    assert error.misshaped == [("entity_model.layers.1.linear.weight", (4, 9), (4, 8))]
    for line in ("missing (2):", "  rel_mlp.bias", "unexpected (1):", "linear.weight: found [4, 9], expected [4, 8]"):
        assert line in str(error)


def test_a_last_layer_that_was_cut_off_is_missed(folder):
    state = {name: tensor for name, tensor in tiny().state_dict().items() if ".layers.1." not in name}
    assert len(refused(folder(state), "missing (8)").missing) == 8


def test_other_architectures_and_files(folder, tmp_path):
    error = refused(folder({"bert.weight": torch.zeros(3)}), "no tensor of a graph foundation model")
    assert error.unexpected == ["bert.weight"] and "rel_mlp.weight" in error.missing
    pna = tiny(aggregate_func="pna").state_dict()
    assert refused(folder(pna), "linear.weight: found [4, 52], expected [4, 8]").misshaped
    refused(folder({"model": {"rel_mlp.weight": 3}}), "rel_mlp.weight hold no tensor")
    refused(folder([1, 2]), "expected a state dict, found list")
    refused(folder({**tiny().state_dict(), "rel_mlp.bias": torch.full((4,), torch.nan)}), "NaN or infinity in rel_mlp")
    state = tiny().state_dict()
    refused(folder(state, {"message_func": "rotate"}), "'rotate' is not supported; there is distmult, transe")
    refused(folder(state, {"aggregate_func": "min"}), "'min' is not supported; there is sum, mean, max, pna")
    refused(folder(state, model_config={"a": 1}), 'expected "entity_model" (GFM-RAG) or "settings" (ragkit)')
    path = folder(state)
    (path / "config.json").write_text("{not json")
    refused(path, "config.json: not valid JSON")
    (path / "config.json").write_text("[]")
    refused(path, "expected a JSON object, found list")
    (path / "config.json").unlink()
    refused(path, "config.json: no such file")
    (path / "model.pth").unlink()
    refused(path, "expected model.safetensors or model.pth, found nothing")
    refused(tmp_path / "nowhere", "no such folder or file")


def test_a_hub_repository_without_a_network():
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    error = refused("rmanluo/GFM-RAG-8M", "could not be had from the hub")
    assert "copy config.json and model.pth to a folder" in str(error)


def test_saving_never_deletes_other_files(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    for write in (save_gfm, export_v1):
        with pytest.raises(CheckpointError, match=r"holds other files \(thesis.tex\)"):
            write(tiny(), tmp_path, encoder="e")
    assert (tmp_path / "thesis.tex").read_text() == "x"
