"""Checkpoints: GFM-RAG's in and out, and our own (config.json and model.safetensors)."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ragkit.files import atomic_dir
from ragkit.gfm.model import GNNRetriever, GraphModel, QueryGNN
from ragkit.gfm.settings import GFMSettings
from ragkit.gfm.state_dict import check_state, config_settings, default_settings, settings_of
from ragkit.gfm.weights_file import CONFIG, PICKLED, SAFE, CheckpointError, find_files, read_config, read_tensors
from ragkit.notes import note

FORMAT = "ragkit.gfm"
Kind = Literal["auto", "retriever", "link_prediction"]
OURS = {CONFIG, SAFE, PICKLED, "README.md"}
# GFM-RAG v1's names of the text encoder's settings, with its defaults.
V1_ENCODER: dict[str, Any] = {
    "text_emb_model_name": None,
    "normalize": True,
    "batch_size": 32,
    "query_instruct": None,
    "passage_instruct": None,
    "model_kwargs": None,
}


def load_gfm(
    path_or_repo: str | Path,
    revision: str | None = None,
    *,
    kind: Kind = "auto",
    device: torch.device | str | None = None,
) -> GNNRetriever | QueryGNN:
    """Loads a graph foundation model.

    Args:
        path_or_repo: A folder with config.json and model.pth (GFM-RAG, either generation of its config) or
            model.safetensors (ours); such a weights file with its config.json beside it; a checkpoint of v1's
            training (model_best.pth), which has none: the tensors tell its sizes, and .hydra/config.yaml beside it the
            rest, or v1's defaults and a printed line; or a repository on the Hugging Face hub, such as
            "rmanluo/GFM-RAG-8M".
        revision: Commit, tag or branch of the repository. (GFM-RAG's authors moved that repository on to their
            version 2; revision "4da9e4655d126a783ae2b795ab73b7c7a7c3f4ac" is of version 1.)
        kind: "auto": a `GNNRetriever` if the checkpoint has `question_mlp`, else a `QueryGNN`. "retriever": a
            `GNNRetriever`; a pre-trained checkpoint's `question_mlp` is new then (see `as_retriever`).
            "link_prediction": a `QueryGNN`.
        device: Where it goes; None: the CPU.

    Returns:
        The model in eval mode. `.encoder_info` says which text encoder it was trained with, where that is known.

    Raises:
        CheckpointError: It cannot be found, is damaged, would run code, or is of another model: then each missing,
            unexpected and mis-shaped tensor is listed.
    """
    if kind not in ("auto", "retriever", "link_prediction"):
        raise ValueError(f"kind: expected auto, retriever or link_prediction, found {kind!r}")
    config_path, weights = find_files(path_or_repo, revision)
    config = {} if config_path is None else read_config(config_path)
    state = read_tensors(weights)
    stated = (
        default_settings(state, str(weights)) if config_path is None else config_settings(config, str(config_path))
    )
    has_question = any(name.startswith("question_mlp.") for name in state)
    settings = settings_of(state, stated, str(weights))
    check_state(state, settings, retriever=has_question, where=str(weights))
    model: GNNRetriever | QueryGNN = _filled(GNNRetriever if has_question else QueryGNN, settings, state)
    model.encoder_info = _encoder_info(config)
    if kind == "retriever" and isinstance(model, QueryGNN):
        model = as_retriever(model)
    elif kind == "link_prediction" and isinstance(model, GNNRetriever):
        model = as_link_predictor(model)
    return model.to(device or "cpu").eval()


def _filled(kind: Any, settings: GFMSettings, state: dict[str, Tensor]) -> Any:
    """A model with these (checked) tensors; no random numbers are drawn for it."""
    with torch.device("meta"):
        model = kind(settings)
    model.load_state_dict({name: tensor.float().contiguous() for name, tensor in state.items()}, assign=True)
    return model


def as_retriever(model: QueryGNN) -> GNNRetriever:
    """The hand-over from pre-training to fine-tuning: a retriever with the pre-trained weights.

    `question_mlp`, which pre-training does not have, is new and random; its names are in `.new_parameters`, and a line
    is printed.

    Args:
        model: The pre-trained model; it is not changed.

    Returns:
        A new model on the same device, in training mode.
    """
    retriever = GNNRetriever(model.settings).to(model.device)
    new, _ = retriever.load_state_dict(model.state_dict(), strict=False)
    retriever.encoder_info, retriever.new_parameters = model.encoder_info, list(new)
    note(f"new (random) parameters, to be trained: {', '.join(new)}; all others are the pre-trained ones")
    return retriever


def as_link_predictor(model: GNNRetriever) -> QueryGNN:
    """A link predictor with a retriever's weights; `question_mlp` is left out."""
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("question_mlp.")}
    other = QueryGNN(model.settings).to(model.device)
    other.load_state_dict(state)
    other.encoder_info = model.encoder_info
    return other


def save_gfm(model: GraphModel, directory: str | Path, encoder: Any = None) -> Path:
    """Writes a model in our format; the folder appears whole or not at all.

    Args:
        model: `GNNRetriever` or `QueryGNN`.
        directory: The folder; one that holds a checkpoint is replaced.
        encoder: The text encoder that the model goes with: an `Encoder`, its name, or a dict; None: as it was loaded.

    Returns:
        The folder.

    Raises:
        CheckpointError: The folder holds other files, or cannot be written (a full disk).
    """
    model = _unwrapped(model)
    info = _info_of(encoder, model)
    config = {
        "format": FORMAT,
        "version": 1,
        "kind": type(model).__name__,
        "settings": {**asdict(model.settings), "hidden_dims": list(model.settings.hidden_dims)},
        "encoder": info,
    }
    with _folder(directory) as folder:
        save_file(_state(model), folder / SAFE, metadata={"format": "pt"})
        _write_config(folder, config)
    return Path(directory).expanduser()


def export_v1(model: GraphModel, directory: str | Path, encoder: Any = None) -> Path:
    """Writes a model as GFM-RAG v1 does (config.json and model.pth), for its `load_model_from_pretrained`.

    Args:
        model: `GNNRetriever` or `QueryGNN`.
        directory: The folder; one that holds a checkpoint is replaced.
        encoder: As in `save_gfm`. v1 needs its name.

    Returns:
        The folder.

    Raises:
        CheckpointError: The folder holds other files, or cannot be written (a full disk).
    """
    model = _unwrapped(model)
    settings, retriever = model.settings, isinstance(model, GNNRetriever)
    info = _info_of(encoder, model) or {}
    if not info.get("text_emb_model_name"):
        warnings.warn("no text encoder is named, so GFM-RAG will not know which to load; give encoder=", stacklevel=2)
    entity_model: dict[str, Any] = {
        "_target_": f"gfmrag.ultra.models.{'QueryNBFNet' if retriever else 'EntityNBFNet'}",
        "input_dim": settings.input_dim,
        "hidden_dims": list(settings.hidden_dims),
        "message_func": settings.message_func,
        "aggregate_func": settings.aggregate_func,
        "short_cut": settings.short_cut,
        "layer_norm": settings.layer_norm,
    }
    defaults = GFMSettings()
    for name in ("concat_hidden", "num_mlp_layer"):
        if getattr(settings, name) != getattr(defaults, name):
            entity_model[name] = getattr(settings, name)
    config = {
        "text_emb_model_config": {
            "_target_": "gfmrag.text_emb_models.BaseTextEmbModel",
            **{name: info.get(name, default) for name, default in V1_ENCODER.items()},
        },
        "model_config": {
            "_target_": f"gfmrag.models.{'GNNRetriever' if retriever else 'QueryGNN'}",
            "entity_model": entity_model,
            "rel_emb_dim": settings.rel_emb_dim,
        },
    }
    with _folder(directory) as folder:
        torch.save({"model": _state(model)}, folder / PICKLED)
        _write_config(folder, config)
    return Path(directory).expanduser()


def _unwrapped(model: Any) -> GraphModel:
    """The model inside `torch.compile` or a data-parallel wrapper."""
    while not isinstance(model, GraphModel):
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if inner is None:
            raise TypeError(f"expected a GNNRetriever or a QueryGNN, found {type(model).__name__}")
        model = inner
    return model


def _state(model: GraphModel) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


@contextmanager
def _folder(directory: str | Path) -> Iterator[Path]:
    """An empty folder that takes the place of `directory` once all is written."""
    path = Path(directory).expanduser()
    others = sorted(file.name for file in path.iterdir() if file.name not in OURS) if path.is_dir() else []
    if others:
        raise CheckpointError(
            f"{path}: holds other files ({', '.join(others[:5])}), which would be lost; give a folder of its own"
        )
    try:
        with atomic_dir(path) as folder:
            yield folder
    except (OSError, RuntimeError, SafetensorError) as error:  # safetensors and torch.save have errors of their own
        raise CheckpointError(f"{path}: cannot be written: {error}; what was there before is whole") from error


def _write_config(folder: Path, config: dict[str, Any]) -> None:
    text = json.dumps(config, ensure_ascii=False, indent=1, allow_nan=False)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def _encoder_info(config: dict[str, Any]) -> dict[str, Any] | None:
    info = next(
        (config[name] for name in ("encoder", "text_emb_model_config", "text_emb_model") if name in config), None
    )
    return {name: value for name, value in info.items() if name != "_target_"} if isinstance(info, dict) else None


def _info_of(encoder: Any, model: GraphModel) -> dict[str, Any] | None:
    """The encoder under v1's names of its settings."""
    if encoder is None:
        return model.encoder_info
    if isinstance(encoder, dict):
        return encoder
    name = encoder if isinstance(encoder, (str, Path)) else getattr(encoder, "name", None)
    if name is None:
        raise ValueError(f"encoder: expected an Encoder, a name or a dict, found {type(encoder).__name__}")
    return {"text_emb_model_name": str(name), "normalize": True}
