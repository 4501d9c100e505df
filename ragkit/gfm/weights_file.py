"""Reading checkpoint files, from a folder or the hub, without ever running what is in them."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ragkit.optional import require
from ragkit.settings import ConfigError, read_yaml

CONFIG, SAFE, PICKLED = "config.json", "model.safetensors", "model.pth"
HYDRA = Path(".hydra") / "config.yaml"  # what Hydra writes into the folder of a run of GFM-RAG
SHOWN = 100  # tensors of a kind that an error lists
PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile


class CheckpointError(ValueError):
    """A checkpoint that cannot be used.

    Attributes:
        missing: Names of tensors that the model wants and the checkpoint lacks.
        unexpected: Names of tensors that the model does not have.
        misshaped: (name, shape found, shape wanted).
    """

    def __init__(
        self,
        message: str,
        missing: list[str] | None = None,
        unexpected: list[str] | None = None,
        misshaped: list[tuple[str, tuple[int, ...], tuple[int, ...]]] | None = None,
    ) -> None:
        self.missing, self.unexpected, self.misshaped = missing or [], unexpected or [], misshaped or []
        shapes = [f"{name}: found {list(found)}, expected {list(wanted)}" for name, found, wanted in self.misshaped]
        for title, lines in (("missing", self.missing), ("unexpected", self.unexpected), ("mis-shaped", shapes)):
            if lines:
                message += f"\n{title} ({len(lines)}):" + "".join(f"\n  {line}" for line in lines[:SHOWN])
                message += f"\n  ... and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
        super().__init__(message)


def find_files(source: str | Path, revision: str | None) -> tuple[Path | None, Path]:
    """(config, weights) of a folder, of a weights file, or of a hub repository.

    The config is config.json, or beside a weights file of GFM-RAG v1's training (model_best.pth) also .hydra's; None:
    such a file has none.

    Raises:
        CheckpointError: There is no such thing; the message says what was looked for.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        weights = next((path / name for name in (SAFE, PICKLED) if (path / name).is_file()), None)
        if weights is None:
            found = ", ".join(sorted(file.name for file in path.iterdir())[:10]) or "nothing"
            raise CheckpointError(f"{path}: expected {SAFE} or {PICKLED}, found {found}")
        return _beside(path / CONFIG), weights
    if path.is_file():
        known = next((path.parent / name for name in (CONFIG, HYDRA) if (path.parent / name).is_file()), None)
        return (_beside(path.parent / CONFIG) if known is None and path.suffix == ".safetensors" else known), path
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)):
        raise CheckpointError(f"{source}: no such folder or file, and not the name of a hub repository (owner/name)")
    config = _download(str(source), CONFIG, revision)
    names = (SAFE, PICKLED) if "format" in read_config(config) else (PICKLED, SAFE)
    try:
        return config, _download(str(source), names[0], revision)
    except CheckpointError:
        return config, _download(str(source), names[1], revision)


def _beside(config: Path) -> Path:
    if not config.is_file():
        raise CheckpointError(
            f"{config}: no such file; the tensors alone do not say the message function, the aggregation or the "
            "short cut"
        )
    return config


def _download(repo: str, name: str, revision: str | None) -> Path:
    hub = require("huggingface_hub")
    try:
        return Path(hub.hf_hub_download(repo, name, revision=revision))
    except (OSError, ValueError, hub.errors.HfHubHTTPError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{repo}: no such folder here, and {name} (revision {revision or 'main'}) could not be had from the hub "
            f"({type(error).__name__}: {reason}). Without a network, copy {CONFIG} and {PICKLED} to a folder and give "
            "its path"
        ) from error


def read_config(path: Path) -> dict[str, Any]:
    """A config.json, or the config.yaml of a run of GFM-RAG.

    Raises:
        CheckpointError: It is no JSON object (or no YAML mapping).
    """
    if path.suffix == ".yaml":
        try:
            return read_yaml(path)
        except ConfigError as error:
            raise CheckpointError(str(error)) from error
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The model's tensors, from safetensors or from a file of torch.save.

    The latter may hold the state dict itself, or {"model": state dict, ...} as v1 writes it. Only tensors and plain
    containers are read (`weights_only=True`): a pickle that names any function is refused, not run.

    Raises:
        CheckpointError: It is cut short, damaged, holds code, or holds no state dict.
    """
    try:
        loaded: Any
        if path.suffix == ".safetensors":
            loaded = load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "global" in str(error).lower():
            raise CheckpointError(
                f"{path}: holds more than tensors, and to load it could run code; it was not loaded "
                f"({_refused(str(error))})"
            ) from error
        raise CheckpointError(
            f"{path}: no file of torch.save, damaged, or holding more than tensors; nothing in it was run"
        ) from error
    except (
        SafetensorError,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:
        raise CheckpointError(f"{path}: cut short or damaged ({type(error).__name__}: {_line(error)})") from error
    if isinstance(loaded, dict) and isinstance(loaded.get("model"), dict):
        loaded = loaded["model"]
    if not isinstance(loaded, dict) or not loaded:
        raise CheckpointError(f"{path}: expected a state dict, found {type(loaded).__name__}")
    wrong = [str(name) for name, value in loaded.items() if not isinstance(value, Tensor)]
    if wrong:
        raise CheckpointError(f"{path}: expected a state dict, but {', '.join(wrong[:5])} hold no tensor")
    return {_plain(str(name)): tensor for name, tensor in loaded.items()}


def _plain(name: str) -> str:
    while name.startswith(PREFIXES):
        name = name.split(".", 1)[1]
    return name


def _line(error: Exception) -> str:
    return (str(error).strip() or "unexpected end").split("\n")[0][:200]


def _refused(message: str) -> str:
    """What the pickle asks for, without PyTorch's advice to allow it."""
    found = re.search(r"GLOBAL (\S+)", message)
    return f"it names {found[1]}" if found else "it names a global that is not a tensor's"
