"""GFM-RAG's training files (stage 2 of version 1, and version 2) as settings of ours.

    config, report = read_gfmrag_config("config/stage2_qa_finetune.yaml", overrides=["train.batch_size=4"])
    print(report)
    GFMFinetuneTrainer(config).train()

`python -m ragkit gfm-finetune stage2_qa_finetune.yaml` does the same. v1's data folders and checkpoints need no
translation: `KnowledgeGraph.load`, `QuestionSet.load` and `load_gfm` read them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import yaml

from ragkit.compat.gfmrag_convert import convert
from ragkit.compat.gfmrag_keys import (
    FINETUNE_CLASSES,
    FINETUNE_MARKS,
    KNOWN_CHOICES,
    OTHER_STAGES,
    PRETRAIN_CLASSES,
    PRETRAIN_MARKS,
    UNUSED,
    is_known,
    known_keys,
    nearest,
    reason_of,
)
from ragkit.compat.gfmrag_report import ConversionReport
from ragkit.compat.gfmrag_retriever import GFMRetriever
from ragkit.compat.hydra_yaml import Choices, compose, groups_of, leaves, put
from ragkit.gfm_config import GFMFinetuneConfig, GFMPretrainConfig
from ragkit.settings import Config, ConfigError, load_config, read_yaml, walk

__all__ = ["ConversionReport", "GFMRetriever", "is_gfmrag_config", "read_gfmrag_config"]

Kind = Literal["finetune", "pretrain", "auto"]
CLASSES: dict[str, type[GFMFinetuneConfig] | type[GFMPretrainConfig]] = {
    "finetune": GFMFinetuneConfig,
    "pretrain": GFMPretrainConfig,
}


def is_gfmrag_config(values: Any) -> bool:
    """Whether a mapping is of GFM-RAG (or Hydra) rather than of ragkit: by `hydra`, `defaults`, `_target_` or
    `datasets.cfgs`, none of which a file of ours has."""
    if not isinstance(values, Mapping):
        return False
    datasets = values.get("datasets")
    if {"hydra", "defaults"} & set(values) or (isinstance(datasets, Mapping) and "cfgs" in datasets):
        return True
    return _has_target(values)


def _has_target(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "_target_" in value or any(_has_target(inner) for inner in value.values())
    return isinstance(value, (list, tuple)) and any(_has_target(inner) for inner in value)


def read_gfmrag_config(
    path_or_mapping: str | Path | Mapping[str, Any], kind: Kind = "auto", overrides: Sequence[str] = ()
) -> tuple[GFMFinetuneConfig | GFMPretrainConfig, ConversionReport]:
    """Reads a training file of GFM-RAG v1 or v2.

    What v1 does and we can do is kept (constant learning rate, no clipping, its criterion of the best model); what has
    no counterpart is in the report, with the reason. Choices of the `defaults` list are read from the folders beside
    the file, or are v1's own where there is no such file. `${...}` is followed; nothing is executed, no class that
    the file names is loaded.

    Args:
        path_or_mapping: The file, or its content.
        kind: What it is for; "auto": as the file says.
        overrides: `key=value`, under GFM-RAG's names (also `doc_ranker=topk_ranker`, `+key=value`) or ours.

    Returns:
        (settings, report).

    Raises:
        ConfigError: The file cannot be read, is not of a training, names a file or key that is not there, or holds
            values that no training can have.
    """
    if kind not in ("auto", *CLASSES):
        raise ValueError(f"kind: expected auto, finetune or pretrain, found {kind!r}")
    if isinstance(path_or_mapping, (str, Path)):
        path = Path(path_or_mapping)
        raw, folder, source = read_yaml(path), path.parent, str(path)
    else:
        raw, folder, source = deepcopy(dict(path_or_mapping)), None, "the mapping"
    choices = Choices(known=KNOWN_CHOICES)
    theirs, ours = _sorted(overrides, raw, choices)
    tree = deepcopy(compose(raw, folder, choices, source))
    for key, value in theirs:
        put(tree, key, value)
    given = dict(leaves(tree))
    chosen = _kind_of(given, kind, source)
    report = ConversionReport(source, chosen)
    for group, name in choices.missing:
        reason = reason_of(f"{group}.", UNUSED) or "no such file beside it, and no such group here"
        report.unused.append((group, name, reason))
    made = convert(given, chosen, report)
    if any(name.startswith("doc_ranker.name=") for name in ours) and "doc_ranker.top_k" not in dict(theirs):
        made.pop("doc_ranker.top_k", None)  # it was for another ranker
    cls = CLASSES[chosen]
    try:
        return load_config(cls, None, ours, base=cls(**_nested(made))), report
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}{_origins(error, report)}", error.problems) from error


def _sorted(
    overrides: Sequence[str], raw: dict[str, Any], choices: Choices
) -> tuple[list[tuple[str, Any]], list[str]]:
    """(theirs, ours) of the overrides; choices of groups go into `choices`."""
    theirs: list[tuple[str, Any]] = []
    ours: list[str] = []
    our_keys = {key for cls in CLASSES.values() for key, _, _ in walk(cls)}
    groups = {*groups_of(raw), *KNOWN_CHOICES}
    for override in overrides:
        plain = override.removeprefix("--").lstrip("+")
        key, sign, text = plain.partition("=")
        key = key.strip()
        if not sign or not key:
            raise ConfigError(f'"{override}" is not a setting; write key=value, for example train.batch_size=4')
        if key.startswith("~"):
            raise ConfigError(f'"{override}": nothing can be taken out of a file; write {key[1:]}=null')
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text  # Hydra's quoting is not YAML's
        if key in groups and (value is None or isinstance(value, str)):
            choices.chosen[key] = value
        elif key == "task.losses" and not _has_target(value):
            ours.append(plain)
        elif is_known(key, exactly=True):
            theirs.append((key, value))
        elif key in our_keys:
            ours.append(plain)
        elif is_known(key) or _inside(raw, key):
            theirs.append((key, value))
        else:
            near = nearest(key, [*known_keys(), *sorted(our_keys)])
            hint = f'; did you mean "{near}"?' if near else ""
            raise ConfigError(f'unknown key "{key}" (found {value!r}), in GFM-RAG\'s names and in ours{hint}')
    return theirs, ours


def _inside(raw: Any, key: str) -> bool:
    for name in key.split("."):
        if not isinstance(raw, dict) or name not in raw:
            return False
        raw = raw[name]
    return True


def _kind_of(given: dict[str, Any], asked: str, source: str) -> str:
    """What the file is for, by its classes and by keys that only one of the trainings has."""
    tops = {key.partition(".")[0] for key in given}
    other = next((stage for mark, stage in OTHER_STAGES.items() if mark in tops), None)
    if other is not None:
        raise ConfigError(f"{source}: is a file of {other}; expected one of stage 2, with train or trainer")
    classes = {str(value).rpartition(".")[2] for key, value in given.items() if key.endswith("_target_")}
    finetune, pretrain = bool(classes & FINETUNE_CLASSES), bool(classes & PRETRAIN_CLASSES)
    if not (finetune or pretrain):
        finetune = any(key in given or key in tops for key in FINETUNE_MARKS)
        pretrain = any(key in given for key in PRETRAIN_MARKS)
    if finetune == pretrain and asked == "auto":
        found = f"it has marks of both ({', '.join(sorted(classes))})" if finetune else "it has no mark of either"
        raise ConfigError(f'{source}: fine-tuning or pre-training? {found}; give kind="finetune" or "pretrain"')
    said = asked if finetune == pretrain else ("finetune" if finetune else "pretrain")
    if asked not in ("auto", said):
        raise ConfigError(f"{source}: is a file for {said}, not for {asked}; use python -m ragkit gfm-{said}")
    return said


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in values.items():
        put(tree, key, value)
    return tree


def _origins(error: ConfigError, report: ConversionReport) -> str:
    """Where settings came from that have another name in the file."""
    wrong: set[str] = {problem.key.partition("[")[0] for problem in error.problems}
    lines = [
        f"\n  {ours} is {theirs} in the file" for theirs, ours, _ in report.used if ours in wrong and ours != theirs
    ]
    return "".join(lines)


def as_config(cls: type[Config], path: Path, overrides: Sequence[str]) -> tuple[Config, ConversionReport] | None:
    """The settings of a command from a GFM-RAG file; None if the file (or the command) is not of that kind."""
    kind = next((kind for kind, known in CLASSES.items() if known is cls), None)
    if kind is None or not is_gfmrag_config(read_yaml(path)):
        return None
    return read_gfmrag_config(path, kind, overrides)  # type: ignore[arg-type]
