"""What a run will take, in figures and in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ragkit.tables import html_table
from ragkit.units import duration, size

PARTS = ("prepare", "training", "evaluation")


@dataclass(frozen=True)
class Estimate:
    """What a run will take; figures of seconds and memory are within a factor of about 1.5 on a quiet machine.

    Attributes:
        device: Where it would run, in words.
        parameters: Parameters of the model that is trained.
        trained: Those of them that training moves.
        steps: Optimizer steps of the whole run.
        seconds: By part: "prepare" (loading, rows, LM scores of LSR), "training" (with checkpoints), "evaluation"
            (while training; for a command also before and after).
        memory_mib: The most memory of the process (on a GPU: of PyTorch on it) in the warm-up.
        weights_mib: Of it the weights of all models, by arithmetic.
        gradients_mib: Of it the gradients.
        optimizer_mib: Of it AdamW's two moments.
        checkpoint_mib: A checkpoint on disk.
        checkpoints: How many are kept at once.
        free_memory_mib: Memory that the process could have.
        free_disk_mib: Free where the run folder will be.
        warmup_steps: Steps that were really made.
        warnings: What would not fit, and what to do.
    """

    device: str
    parameters: int
    trained: int
    steps: int
    seconds: Mapping[str, float]
    memory_mib: float
    weights_mib: float
    gradients_mib: float
    optimizer_mib: float
    checkpoint_mib: float
    checkpoints: int
    free_memory_mib: float
    free_disk_mib: float
    warmup_steps: int
    warnings: tuple[str, ...] = field(default=())

    @property
    def total_seconds(self) -> float:
        """Seconds of the whole run."""
        return sum(self.seconds.values())

    @property
    def disk_mib(self) -> float:
        """What the checkpoints take on disk."""
        return self.checkpoint_mib * self.checkpoints

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` gives an equal object back."""
        return {**dataclasses.asdict(self), "seconds": dict(self.seconds), "warnings": list(self.warnings)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Estimate:
        """The estimate that `to_dict` wrote.

        Raises:
            ValueError: A field is missing, unknown or no number; the message names it.
        """
        kinds = {each.name: each.type for each in dataclasses.fields(cls)}
        wrong = sorted(kinds.keys() ^ values.keys())
        if wrong:
            raise ValueError(f"not an estimate: the field {wrong[0]!r} is missing or unknown")
        for name, kind in kinds.items():
            found = values[name]
            parts = name == "seconds" and isinstance(found, Mapping) and set(found) == set(PARTS)
            numbers = list(found.values()) if parts else [found if name != "seconds" else None]
            fits = all(isinstance(x, int | float) and not isinstance(x, bool) and x >= 0 for x in numbers)
            if kind in ("int", "float", "Mapping[str, float]") and not fits:
                raise ValueError(f"not an estimate: {name} is {found!r}, expected numbers from 0")
        return cls(**{**values, "seconds": dict(values["seconds"]), "warnings": tuple(values["warnings"])})

    def _rows(self) -> list[tuple[str, str]]:
        share = f"{self.trained / self.parameters:.0%}" if self.parameters else "-"
        parts = ", ".join(f"{name} {duration(self.seconds[name])}" for name in PARTS if self.seconds[name] >= 0.5)
        sizes = f"weights {size(self.weights_mib)}, gradients {size(self.gradients_mib)}"
        return [
            ("parameters", f"{self.parameters:,}, trained {self.trained:,} ({share})"),
            ("steps", f"{self.steps:,}"),
            ("time", f"about {duration(self.total_seconds)}" + (f" ({parts})" if parts else "")),
            ("memory", f"about {size(self.memory_mib)} of {size(self.free_memory_mib)} that can be had"),
            ("of it", f"{sizes}, optimizer {size(self.optimizer_mib)}"),
            (
                "disk",
                f"about {size(self.disk_mib)} of {size(self.free_disk_mib)} free "
                f"({self.checkpoints} x {size(self.checkpoint_mib)} of checkpoints)",
            ),
            ("device", self.device),
            *(("warning", text) for text in self.warnings),
        ]

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self._rows())
        return "\n".join(f"{name.ljust(width)}  {text}" for name, text in self._rows())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table([["estimate", ""], *self._rows()], f"from {self.warmup_steps} steps that were really made")
