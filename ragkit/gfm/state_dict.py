"""From a checkpoint's tensors and config to the model's settings; shapes decide wherever they can."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ragkit.gfm.layers import PNA_WIDTH
from ragkit.gfm.model import GNNRetriever, QueryGNN
from ragkit.gfm.settings import GFMSettings
from ragkit.gfm.weights_file import CheckpointError
from ragkit.notes import note

# What GFM-RAG's entity model assumes where its config is silent.
SILENT = {"message_func": "distmult", "aggregate_func": "sum", "short_cut": False, "activation": "relu"}
# What its training files state, for checkpoints that come without any config.
TRAINED = {"message_func": "distmult", "aggregate_func": "sum", "short_cut": True}
SHAPED = ("rel_emb_dim", "input_dim", "hidden_dims", "layer_norm", "concat_hidden", "num_mlp_layer")


def config_settings(config: dict[str, Any], where: str) -> dict[str, Any]:
    """The settings that a config.json states, whatever kit and version wrote it.

    Known are ours ("settings") and GFM-RAG's of both generations (`rel_emb_dim` or `feat_dim`, beside "entity_model"
    at whatever depth). Hydra's `_target_` are ignored: they name classes that move.

    Raises:
        CheckpointError: Neither is there.
    """
    if isinstance(config.get("settings"), dict):
        found, outer = config["settings"], {}
    else:
        holder = _holder(config)
        if holder is None:
            keys = ", ".join(map(repr, config)) or "nothing"
            raise CheckpointError(f'{where}: expected "entity_model" (GFM-RAG) or "settings" (ragkit), found {keys}')
        found, outer = holder["entity_model"], holder
    names = {*SILENT, *SHAPED}
    settings = {name: value for name, value in found.items() if name in names and value is not None}
    for name in ("feat_dim", "rel_emb_dim"):
        if isinstance(outer.get(name), int):
            settings["rel_emb_dim"] = outer[name]
    if found.get("remove_one_hop"):
        warnings.warn(f"{where}: remove_one_hop is not supported; only the asked triples are hidden", stacklevel=4)
    return settings


def default_settings(state: dict[str, Tensor], where: str) -> dict[str, Any]:
    """What is assumed of tensors without a config, where their shapes do not tell; a line says so."""
    settings: dict[str, Any] = dict(TRAINED)
    first, relations = (state.get(name) for name in ("entity_model.layers.0.linear.weight", "rel_mlp.weight"))
    told = first is not None and relations is not None and first.shape[-1:] == (PNA_WIDTH * len(relations),)
    if told:
        settings["aggregate_func"] = "pna"
    assumed = [f"{name} {value}" for name, value in settings.items() if not (told and name == "aggregate_func")]
    note(f"{where}: no config beside it; its sizes are its tensors', {', '.join(assumed)} as in GFM-RAG's own files")
    return settings


def _holder(config: dict[str, Any]) -> dict[str, Any] | None:
    """The (nested) dict that has an "entity_model"."""
    if isinstance(config.get("entity_model"), dict):
        return config
    for value in config.values():
        if isinstance(value, dict) and (found := _holder(value)) is not None:
            return found
    return None


def settings_of(state: dict[str, Tensor], stated: dict[str, Any], where: str) -> GFMSettings:
    """The settings that the tensors have; the config's for what shapes cannot tell, or where a tensor is missing.

    Raises:
        CheckpointError: They name a kind that there is not, or there is no tensor of a GFM at all.
    """
    shaped = _shaped(state)
    if not shaped and not any(name.startswith(("rel_mlp", "question_mlp", "entity_model.")) for name in state):
        raise CheckpointError(
            f"{where}: no tensor of a graph foundation model", unexpected=sorted(state), missing=_core_names(stated)
        )
    said = stated.get("hidden_dims")
    if isinstance(said, list) and "hidden_dims" in shaped:  # a layer that is not there is missing, not unwanted
        shaped["hidden_dims"] += tuple(said[len(shaped["hidden_dims"]) :])
    other = {
        name: (stated[name], value)
        for name, value in shaped.items()
        if name in stated and _comparable(stated[name]) != _comparable(value)
    }
    if other:
        lines = ", ".join(f"{name} {said!r}, the tensors {found!r}" for name, (said, found) in other.items())
        warnings.warn(f"{where}: config.json says {lines}; the tensors decide", stacklevel=4)
    try:
        return GFMSettings(**{**SILENT, **stated, **shaped})
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{where}: {error}") from error


def _comparable(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _shaped(state: dict[str, Tensor]) -> dict[str, Any]:
    """What the shapes of the tensors say, as far as they are there."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    found: dict[str, Any] = {}
    if len(shapes.get("rel_mlp.weight", ())) == 2:
        found["input_dim"], found["rel_emb_dim"] = shapes["rel_mlp.weight"]
    layers = _places(shapes, r"entity_model\.layers\.(\d+)\.")
    mlp = _places(shapes, r"entity_model\.mlp\.(\d+)\.weight")
    outs = [shapes.get(f"entity_model.layers.{i}.linear.weight", ()) for i in range(len(layers))]
    if layers and layers == list(range(len(layers))) and all(len(shape) == 2 for shape in outs):
        found["hidden_dims"] = tuple(shape[0] for shape in outs)
        found["layer_norm"] = any(".layer_norm." in name for name in shapes)
    if mlp:
        found["num_mlp_layer"] = len(mlp)
    head = shapes.get(f"entity_model.mlp.{mlp[0]}.weight", ()) if mlp else ()
    if len(head) == 2 and "hidden_dims" in found and "input_dim" in found:
        concat, plain = (d + found["input_dim"] for d in (sum(found["hidden_dims"]), found["hidden_dims"][-1]))
        if head[1] in (concat, plain):
            found["concat_hidden"] = head[1] != plain
    return found


def _places(names: Iterable[str], pattern: str) -> list[int]:
    return sorted({int(match[1]) for name in names if (match := re.match(pattern, name))})


def _core_names(stated: dict[str, Any]) -> list[str]:
    try:
        return list(shapes_of(GFMSettings(**{**SILENT, **stated}), retriever=False))
    except (ValueError, TypeError):
        return ["rel_mlp.weight", "rel_mlp.bias", "entity_model.layers.0.linear.weight", "entity_model.mlp.0.weight"]


def shapes_of(settings: GFMSettings, retriever: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's tensors."""
    with torch.device("meta"):
        model = (GNNRetriever if retriever else QueryGNN)(settings)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def check_state(state: dict[str, Tensor], settings: GFMSettings, retriever: bool, where: str) -> None:
    """Compares the tensors with the model's.

    Raises:
        CheckpointError: They differ (each is listed), or one holds NaN or infinity.
    """
    wanted = shapes_of(settings, retriever)
    missing = [name for name in wanted if name not in state]
    unexpected = [name for name in state if name not in wanted]
    misshaped = [
        (name, tuple(state[name].shape), shape)
        for name, shape in wanted.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if missing or unexpected or misshaped:
        kind = "GNNRetriever" if retriever else "QueryGNN"
        raise CheckpointError(f"{where}: its tensors are not those of a {kind}", missing, unexpected, misshaped)
    broken = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise CheckpointError(f"{where}: NaN or infinity in {', '.join(broken)}")
