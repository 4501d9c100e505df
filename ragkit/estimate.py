"""What a run will take, before it starts: time, memory and disk, from the model's size and a few real steps.

python -m ragkit.estimate COMMAND [config.yaml] [key=value ...] [--json [FILE]]
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragkit.commands import COMMANDS
from ragkit.compat.gfmrag import as_config
from ragkit.config import Config, GFMFinetuneConfig, GFMPretrainConfig, LSRConfig, RALTConfig, load_config
from ragkit.console import explain, silence_libraries
from ragkit.files import atomic_write_json
from ragkit.inputs import CommandError
from ragkit.tables import html_table

if TYPE_CHECKING:
    from ragkit.estimate_runs import Measured

PARTS = ("prepare", "training", "evaluation")
TIGHT = 0.9  # share of what is free


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
            numbers = found.values() if name == "seconds" and isinstance(found, Mapping) else [found]
            fits = all(isinstance(x, int | float) and not isinstance(x, bool) and x >= 0 for x in numbers)
            if kind in ("int", "float", "Mapping[str, float]") and not fits:
                raise ValueError(f"not an estimate: {name} is {found!r}, expected numbers from 0")
        return cls(**{**values, "seconds": dict(values["seconds"]), "warnings": tuple(values["warnings"])})

    def _rows(self) -> list[tuple[str, str]]:
        share = f"{self.trained / self.parameters:.0%}" if self.parameters else "-"
        parts = ", ".join(f"{name} {_duration(self.seconds[name])}" for name in PARTS if self.seconds[name] >= 0.5)
        sizes = f"weights {_size(self.weights_mib)}, gradients {_size(self.gradients_mib)}"
        return [
            ("parameters", f"{self.parameters:,}, trained {self.trained:,} ({share})"),
            ("steps", f"{self.steps:,}"),
            ("time", f"about {_duration(self.total_seconds)}" + (f" ({parts})" if parts else "")),
            ("memory", f"about {_size(self.memory_mib)} of {_size(self.free_memory_mib)} that can be had"),
            ("of it", f"{sizes}, optimizer {_size(self.optimizer_mib)}"),
            (
                "disk",
                f"about {_size(self.disk_mib)} of {_size(self.free_disk_mib)} free "
                f"({self.checkpoints} x {_size(self.checkpoint_mib)} of checkpoints)",
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


def estimate(what: Any, warmup_steps: int = 4) -> Estimate:
    """Says what a run will take, from a few real steps in a temporary folder.

    Args:
        what: The settings of a command (lsr, ralt, gfm-pretrain, gfm-finetune): what it would build is built on a
            part of the texts, and its scoring before and after counts too. Or a trainer (`LSRTrainer`, `RALTTrainer`,
            `GFMFinetuneTrainer`, `GFMPretrainTrainer`): what its `train()` will take. The trainer, its weights, the
            random numbers of the process and its threads are afterwards as they were; the trained weights are copied
            for it.
        warmup_steps: Steps at least; more are made while they take less than a second. The first is not counted.

    Returns:
        The estimate. Memory is that of the whole process: settings are best estimated in one of their own, which
        `python -m ragkit.estimate` is. LM scores, graphs and embeddings that an earlier run has kept are counted as
        if they were not there.

    Raises:
        TypeError: Neither settings of a training nor a trainer.
        ValueError: Whatever the training itself would refuse; or fewer than two warm-up steps.
    """
    from ragkit import estimate_commands, estimate_runs, warm_up

    if isinstance(warmup_steps, bool) or not isinstance(warmup_steps, int) or warmup_steps < 2:
        raise ValueError(f"warmup_steps: found {warmup_steps!r}, expected 2 or more; the first one is not counted")
    settings = what if isinstance(what, Config) else what.config if hasattr(what, "config") else None
    device = estimate_commands.device_of(what)
    with warm_up.left_as_it_was(device) as folder, warm_up.PeakMemory(device) as memory:
        if isinstance(what, Config):
            measured = estimate_commands.measure_command(what, warmup_steps, folder)
        else:
            measured = estimate_runs.measure(what, warmup_steps, folder, ours=False)
        name, free = warm_up.device_name(device), warm_up.free_memory(device)
    disk = warm_up.free_disk(settings.output_dir)  # type: ignore[union-attr]
    return _estimate(measured, settings, memory.mib, name, free, disk)


def _estimate(found: Measured, config: Any, memory: float, device: str, free: float, disk: float) -> Estimate:
    taken = memory - found.copied_mib
    kept = min(found.saves, config.train.save_total_limit)
    # A new checkpoint is whole before an old one goes.
    most = found.checkpoint_mib * min(found.saves, kept + 1)
    warnings = []
    if taken > TIGHT * free:
        how = "does not fit" if taken > free else "fits barely"
        warnings.append(
            f"memory: about {_size(taken)} {how} in {_size(free)}; a smaller train.batch_size with more "
            "train.gradient_accumulation_steps takes less, and so does a smaller model"
        )
    if most > TIGHT * disk:
        how = "do not fit" if most > disk else "fit barely"
        warnings.append(
            f"disk: checkpoints of about {_size(most)} {how} in {_size(disk)}; make room, set output_dir to another "
            "disk, or train.save_total_limit=1"
        )
    seconds = {"prepare": found.prepare, "training": found.training, "evaluation": found.evaluation}
    return Estimate(
        device=device,
        parameters=found.parameters,
        trained=found.trained,
        steps=found.steps,
        seconds=seconds,
        memory_mib=taken,
        weights_mib=found.weights_mib,
        gradients_mib=found.trained_mib,
        optimizer_mib=2 * found.trained_mib,
        checkpoint_mib=found.checkpoint_mib,
        checkpoints=kept,
        free_memory_mib=free,
        free_disk_mib=disk,
        warmup_steps=found.made,
        warnings=tuple(warnings),
    )


def _duration(seconds: float) -> str:
    """Seconds in words, to two digits."""
    for size, name in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 1.5 * size:
            return f"{_two(seconds / size)} {name}"
    return f"{_two(seconds)} s"


def _size(mib: float) -> str:
    """MiB in words, to two digits."""
    return f"{_two(mib / 1024)} GiB" if mib >= 995 else f"{_two(mib)} MiB"


def _two(value: float) -> str:
    """Two significant digits, written out."""
    if value <= 0:
        return "0"
    places = 1 - math.floor(math.log10(value))
    rounded = round(value, places)
    return f"{rounded:,.{max(0, 1 - math.floor(math.log10(rounded)))}f}" if rounded < 10 else f"{rounded:,.0f}"


# ---- the command line ----


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the estimate of a command.

    Args:
        arguments: `COMMAND [config.yaml] [key=value ...]`, with `--json FILE` to write it there too, or `--json` alone
            to print it as JSON on the last line and nothing else; None: those of the process.

    Returns:
        The exit status: 0, 1 for a fault of the program, 2 for something wrong in what was given.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    show_traceback = "--traceback" in given
    silence_libraries()
    try:
        given, as_json, file = _split([argument for argument in given if argument != "--traceback"])
        if not given or given[0] in ("-h", "--help", "help"):
            print(__doc__)
            return 0 if given else 2
        found = estimate(_settings(given[0], given[1:]))
        if file is not None:
            atomic_write_json(file, found.to_dict())
        print(json.dumps(found.to_dict()) if as_json else found, flush=True)
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        message = explain(error)
        if message is None or show_traceback:
            traceback.print_exc()
        else:
            print(f"ragkit: {message}", file=sys.stderr)
        return 1 if message is None else 2


TRAININGS = (LSRConfig, RALTConfig, GFMPretrainConfig, GFMFinetuneConfig)


def _settings(name: str, rest: list[str]) -> Config:
    """The settings that a command line gives, read as `python -m ragkit` reads them."""
    trainings = [known for known, (kind, _) in COMMANDS.items() if kind in TRAININGS]
    if name not in trainings:
        raise CommandError(f'"{name}" is no training; estimates are made of {", ".join(trainings)}')
    kind, _ = COMMANDS[name]
    files = [argument for argument in rest if "=" not in argument and not argument.startswith("-")]
    if len(files) > 1:
        raise CommandError(f"found {len(files)} configuration files ({', '.join(files)}), expected one at most")
    overrides = [argument for argument in rest if argument not in files]
    foreign = as_config(kind, Path(files[0]), overrides) if files else None
    return foreign[0] if foreign is not None else load_config(kind, files[0] if files else None, overrides)


def _split(given: list[str]) -> tuple[list[str], bool, Path | None]:
    """(arguments without --json, whether JSON is printed, the file that it goes to)."""
    if "--json" not in given:
        return given, False, None
    place = given.index("--json")
    after = given[place + 1 : place + 2]
    if after and "=" not in after[0] and after[0].endswith(".json"):
        return given[:place] + given[place + 2 :], False, Path(after[0])
    return given[:place] + given[place + 1 :], True, None


if __name__ == "__main__":
    raise SystemExit(main())
