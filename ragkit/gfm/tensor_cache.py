"""Tensors and a little JSON in a folder of the user's cache: what takes long to make and can be made again.

A folder's name is the hash of all that shapes its content. A copy that is cut short or altered is made anew.
"""

from __future__ import annotations

import hashlib
import json
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ragkit.files import atomic_dir
from ragkit.graph.cache import user_cache

VERSION = 2  # raise it whenever the same key gives another content
Content = tuple[dict[str, Tensor], dict[str, Any]]


def key_of(*parts: str | bytes) -> str:
    """Hash of the parts, each with its length."""
    state = hashlib.blake2b(f"ragkit tensors {VERSION}".encode(), digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little") + data)
    return state.hexdigest()


def cached(cache: bool | str | Path, kind: str, key: str, make: Callable[[], Content]) -> Content:
    """Reads (tensors, JSON) from the cache, or makes and keeps them.

    Args:
        cache: True: the user's cache folder; a folder; False: makes them and keeps nothing.
        kind: What they are ("questions"), for the folder's name.
        key: From `key_of`.
        make: Makes them.
    """
    if cache is False:
        return make()
    folder = (user_cache() / "gfm" if cache is True else Path(cache)) / f"{kind}-{key}"
    if (folder / "meta.json").is_file():
        try:
            return _read(folder, key)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            warnings.warn(f"{folder} cannot be used ({error}); it is made anew", stacklevel=3)
    tensors, meta = make()
    try:
        with atomic_dir(folder) as temporary:
            path = temporary / "tensors.safetensors"
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
            record = {"version": VERSION, "key": key, "checksum": zlib.crc32(path.read_bytes()), "meta": meta}
            (temporary / "meta.json").write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        reason = getattr(error, "strerror", None) or error
        warnings.warn(f"{folder} could not be written ({reason}); nothing is kept", stacklevel=3)
    return tensors, meta


def _read(folder: Path, key: str) -> Content:
    record = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    if record["version"] != VERSION or record["key"] != key:
        raise ValueError("it is of something else or of another version")
    path = folder / "tensors.safetensors"
    if zlib.crc32(path.read_bytes()) != record["checksum"]:
        raise ValueError(f"{path.name} is cut short or altered")
    return load_file(path), record["meta"]
