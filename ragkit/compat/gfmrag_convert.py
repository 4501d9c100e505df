"""From the values of a GFM-RAG training file to values of ours."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ragkit.compat.gfmrag_keys import (
    ENCODER_OF_DATASETS,
    LOSS_CLASSES,
    RANKER_CLASSES,
    SAME,
    SAME_FINETUNE,
    SAME_PRETRAIN,
    SILENT_MODEL,
    SILENT_VALUES,
    UNUSED,
    UNUSED_FINETUNE,
    UNUSED_PRETRAIN,
    canonical,
    is_known,
    known_keys,
    nearest,
    reason_of,
)
from ragkit.compat.gfmrag_report import ConversionReport
from ragkit.compat.hydra_yaml import Unresolved
from ragkit.settings import ConfigError

PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def convert(given: dict[str, Any], kind: str, report: ConversionReport) -> dict[str, Any]:
    """Translates values by dotted key.

    Args:
        given: Their values.
        kind: "finetune" or "pretrain".
        report: Takes what is found.

    Returns:
        Our values by dotted key.

    Raises:
        ConfigError: A setting without which training would be another one cannot be taken over.
    """
    return _Conversion(kind, report).run(given)


class _Conversion:
    def __init__(self, kind: str, report: ConversionReport) -> None:
        self.kind, self.report = kind, report
        self.finetune = kind == "finetune"
        self.made: dict[str, Any] = {}
        self.values: dict[str, tuple[str, Any]] = {}  # {v1's name: (name in the file, value)}
        self.same = {**SAME, **(SAME_FINETUNE if self.finetune else SAME_PRETRAIN)}
        self.unused = {**(UNUSED_FINETUNE if self.finetune else UNUSED_PRETRAIN), **UNUSED}
        self.special: dict[str, Callable[[str, Any], None]] = {
            "hydra.run.dir": self._output_dir,
            "task.metric": self._metrics,
            "train.watched_metric": self._watched,
            "train.eval_strategy": self._eval_strategy,
            "train.do_train": self._do_train,
            "model.dtype": self._dtype,
            "text_emb_model.normalize": self._normalize,
            "model.entity_model.activation": self._activation,
            "datasets.cfgs.inverse_relation_feat": self._inverse,
        }
        if self.finetune:
            self.special["task.losses"] = self._losses

    def run(self, given: dict[str, Any]) -> dict[str, Any]:
        values = self.values = self._one_name_each(given)
        for name, value in (("max_grad_norm", 0.0), ("warmup_steps", 0), ("schedule", "constant")):
            self.made[f"train.{name}"] = value
        self.report.notes.append("as in v1: constant learning rate, no warm-up, no clipping of gradients")
        if self.finetune:
            self._ranker()
        self._optimizer_class()
        self._validation()
        for key, (theirs, value) in values.items():
            self._take(key, theirs, value)
        if any(key.startswith("model.entity_model.") for key in self.made):
            silent = [name for name in SILENT_MODEL if f"model.entity_model.{name}" not in self.made]
            self.made.update({f"model.entity_model.{name}": SILENT_MODEL[name] for name in silent})
            if silent:
                self.report.notes.append(f"as in v1, where the file is silent on them: {', '.join(silent)} off")
        self._end()
        return self.made

    def _one_name_each(self, given: dict[str, Any]) -> dict[str, tuple[str, Any]]:
        """{v1's name: (name in the file, value)}; of two places for one setting the first that says something wins."""
        values: dict[str, tuple[str, Any]] = {}
        # What the data sets say of the encoder is what v1 reads; text_emb_model is only where it refers to.
        ordered = sorted(given.items(), key=lambda item: not item[0].startswith(ENCODER_OF_DATASETS))
        for theirs, value in ordered:
            key = canonical(theirs)
            if key not in values or values[key][1] is None:
                values[key] = (theirs, value)
            elif value is not None and value != values[key][1]:
                self._leave(theirs, value, f"{values[key][0]} says another, and counts")
        return values

    def _get(self, key: str, default: Any = None) -> tuple[str, Any]:
        theirs, value = self.values.get(key, (key, default))
        if isinstance(value, Unresolved):
            raise value.error
        return theirs, value

    def _take(self, key: str, theirs: str, value: Any) -> None:
        if key.rpartition(".")[2] == "_target_" or value == {}:  # an empty group says nothing
            return
        if key in self.same or key in self.special:
            if isinstance(value, Unresolved) and key != "hydra.run.dir":
                raise value.error
        if key in self.same:
            if key.endswith("_instruct") and value is None:
                value = ""
            if key == "train.eval_steps" and theirs != key and self._get("train.eval_strategy")[1] in (None, "epoch"):
                self._leave(theirs, value, "evaluations are at the end of an epoch")
                return
            if key == "train.num_epoch" and value == 0:
                raise ConfigError(f"{theirs}: 0 epochs train nothing; gfm-evaluate checkpoint=... scores a model")
            self._set(theirs, self.same[key], value)
        elif key in self.special:
            self.special[key](theirs, value)
        elif key in SILENT_VALUES and value in SILENT_VALUES[key]:
            return
        elif (reason := reason_of(key, self.unused)) is not None:
            self._leave(theirs, value, reason)
        elif is_known(key):
            self._leave(theirs, value, f"not a setting of {self.kind}")
        else:
            self.report.unknown.append((theirs, value, nearest(theirs, known_keys())))

    def _set(self, theirs: str, ours: str, value: Any) -> None:
        self.made[ours] = value
        self.report.used.append((theirs, ours, value))

    def _leave(self, theirs: str, value: Any, reason: str) -> None:
        self.report.unused.append((theirs, value, reason))

    # ---- what is more than another name ----

    def _output_dir(self, theirs: str, value: Any) -> None:
        """The part before what Hydra fills in with the time; the run folder's own name has the time in it."""
        fixed = str(value.text if isinstance(value, Unresolved) else value).partition("${")[0]
        folder = fixed if fixed == str(value) else fixed.rpartition("/")[0]
        if folder.strip("/"):
            self._set(theirs, "output_dir", folder.rstrip("/"))
        else:
            self._leave(theirs, value, "no folder is left without the time; output_dir holds the run folders")

    def _metrics(self, theirs: str, value: Any) -> None:
        names = [str(name) for name in value] if isinstance(value, list) else []
        cuts = sorted({int(match[1]) for name in names if (match := re.fullmatch(r"(?:hits|recall)@(\d+)", name))})
        others = [name for name in names if not re.fullmatch(r"(hits|recall)@\d+|mrr|mr", name)]
        if others:
            self._leave(theirs, others, "no such metric here")
        if cuts:
            self._set(theirs, "task.ks", cuts)

    def _watched(self, theirs: str, value: Any) -> None:
        if value is None:
            return
        name = str(value)
        if self.finetune:
            match = re.fullmatch(r"(?:(document|entity)_)?(mrr|hits@\d+|recall@\d+)", name)
            if match:
                side = "doc" if match[1] == "document" else "ent"
                name = f"{side}_{match[2] if match[2].startswith('recall') else 'filtered_' + match[2]}"
        self._set(theirs, "train.watched_metric", name)

    def _eval_strategy(self, theirs: str, value: Any) -> None:
        if value not in ("epoch", "step", "steps", None):
            raise ConfigError(f"{theirs}: found {value!r}, expected epoch or step")

    def _do_train(self, theirs: str, value: Any) -> None:
        if value is False:
            raise ConfigError(f"{theirs}: false trains nothing; gfm-evaluate checkpoint=... scores a model")

    def _dtype(self, theirs: str, value: Any) -> None:
        if value in PRECISIONS:
            self._set(theirs, "train.precision", PRECISIONS[value])
        elif value is not None:
            self._leave(theirs, value, f"train.precision is fp32 unless it is one of {', '.join(PRECISIONS)}")

    def _normalize(self, theirs: str, value: Any) -> None:
        name = str(self._get("text_emb_model.text_emb_model_name", "")[1])
        if not value and not name.endswith("all-mpnet-base-v2"):  # which ends in a layer that normalises
            self._leave(theirs, value, "embeddings always have length 1 here; weights trained with others do not fit")

    def _activation(self, theirs: str, value: Any) -> None:
        if value != "relu":
            raise ConfigError(f"{theirs}: {value!r} is not supported; there is relu")

    def _inverse(self, theirs: str, value: Any) -> None:
        if value not in (None, "text"):
            self._leave(theirs, value, 'an inverse relation is the text "inverse_<relation>", as in v1')

    def _ranker(self) -> None:
        for group in ("doc_ranker", "model.ranker"):
            theirs, target = self._get(f"{group}._target_")
            name = None if target is None else RANKER_CLASSES.get(str(target).rpartition(".")[2])
            place, k = self._get(f"{group}.top_k")
            self.values.pop(f"{group}.top_k", None)
            if target is not None and name is None:
                reason = f"none of {', '.join(RANKER_CLASSES)}; the ranker is idf_topk (doc_ranker.name)"
                self._leave(theirs, target, reason)
            if name is not None:
                self._set(theirs, "doc_ranker.name", name)
            if k is not None and name in ("topk", "idf_topk", None):
                self._set(place, "doc_ranker.top_k", k)
            elif k is not None:
                self._leave(place, k, f"the ranker {name} takes all entities")

    def _optimizer_class(self) -> None:
        theirs, target = self._get("optimizer._target_")
        if target is not None and str(target).rpartition(".")[2] != "AdamW":
            self._leave(theirs, target, "the optimizer is AdamW, with the file's learning rate")

    def _validation(self) -> None:
        """What chooses the best model."""
        if not self.finetune:
            self.made["train.watched_metric"] = "mrr"
            self.report.notes.append(
                "v1 scores facts that it trains on; here task.valid_share of the facts are held out and scored"
            )
            return
        if "train.watched_metric" not in self.values:
            self.made["train.watched_metric"] = "ent_filtered_mrr"
            self.report.notes.append(
                "as in v1: the best model is that with the best mean (filtered) mrr of entities, "
                "train.watched_metric=ent_filtered_mrr; train.watched_metric=doc_recall@5 looks at documents"
            )
        if self._get("datasets.valid_names")[1]:
            self.made["datasets.valid_share"] = 0.0
            self.report.notes.append(
                "as in v1: the test questions of datasets.valid_names choose the best model, so its scores on them "
                "are not those of a test"
            )
        elif self._get("train.do_eval", True)[1] is False:
            self.made["datasets.valid_share"] = 0.0
        else:
            self.report.notes.append(
                "no datasets.valid_names: a part of the training questions (datasets.valid_share) chooses the best "
                "model"
            )

    def _losses(self, theirs: str, value: Any) -> None:
        if not isinstance(value, list) or any(not isinstance(term, dict) for term in value):
            raise ConfigError(f"{theirs}: expected a list of losses, each with loss._target_ and cfg.weight")
        terms = [term for place, given in enumerate(value) if (term := self._loss(f"{theirs}[{place}]", given))]
        if not terms:
            raise ConfigError(f"{theirs}: none of its losses is one of {', '.join(LOSS_CLASSES)}")
        self._set(theirs, "task.losses", terms)

    def _loss(self, where: str, given: dict[str, Any]) -> dict[str, Any] | None:
        loss, cfg = given.get("loss"), given.get("cfg")
        if not isinstance(loss, dict) or not isinstance(loss.get("_target_"), str):
            raise ConfigError(f"{where}: expected loss with a _target_ such as gfmrag.losses.BCELoss, found {given!r}")
        options = {**{k: v for k, v in given.items() if k not in ("name", "loss", "cfg")}, **(cfg or {})}
        target = str(loss["_target_"]).rpartition(".")[2]
        if options.pop("is_distillation_loss", False) or target not in LOSS_CLASSES:
            reason = "there is no distillation from the text encoder, and no other loss; the others keep their weights"
            self._leave(f"{where}.loss._target_", target, reason)
            return None
        if "weight" not in options:
            raise ConfigError(f"{where}: expected a weight in its cfg")
        node_type = options.pop("target_node_type", None)
        documents = bool(options.pop("is_doc_loss", False)) or node_type == "document"
        if node_type not in (None, "entity", "document"):
            self._leave(
                f"{where}.target_node_type", node_type, "losses are on entities or documents; on entities here"
            )
        term = {"name": LOSS_CLASSES[target], "weight": options.pop("weight")}
        rest = {name: value for name, value in loss.items() if name != "_target_"}
        if term["name"] == "bce":  # the class's own default is 0
            term["adversarial_temperature"] = rest.pop("adversarial_temperature", 0.0)
        if documents:
            term.update(is_doc_loss=True, doc_score="simple")
        if node_type == "document":
            note = "losses on documents: their scores are sums over their entities, where v2 has nodes for documents"
            if note not in self.report.notes:
                self.report.notes.append(note)
        for name, value in {**rest, **options}.items():
            self.report.unknown.append((f"{where}.{name}", value, None))
        return term

    def _end(self) -> None:
        """What only the whole tells."""
        watched = str(self.made.get("train.watched_metric", ""))
        cut = re.search(r"@(\d+)$", watched)
        if cut and "task.ks" in self.made:
            self.made["task.ks"] = sorted({*self.made["task.ks"], int(cut[1])})
        steps = self._get("train.batch_per_epoch")
        if (
            steps[1] is not None
            and steps[0] != "train.batch_per_epoch"
            and len(self.made.get("datasets.train_names", [])) > 1
        ):
            self.report.notes.append(f"{steps[0]}: the steps of an epoch are counted in each data set, not in all")
        if self.made.get("train.checkpoint") is not None:
            self.report.notes.append(
                "train.checkpoint: its weights are loaded, not its optimizer and epoch; resume=RUN_FOLDER goes on "
                "with a run"
            )
