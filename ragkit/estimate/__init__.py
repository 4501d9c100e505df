"""What a run will take, before it starts: time, memory and disk, from the model's size and a few real steps.

from ragkit.estimate import estimate
print(estimate(LSRConfig()))           # or a trainer

python -m ragkit.estimate COMMAND [config.yaml] [key=value ...] [--json [FILE]]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ragkit.config import Config
from ragkit.estimate.figures import Estimate
from ragkit.units import size

if TYPE_CHECKING:
    from ragkit.estimate.measured import Measured

__all__ = ["Estimate", "estimate"]
TIGHT = 0.9  # share of what is free


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
        `python -m ragkit.estimate` is. LM scores, graphs and embeddings that
        an earlier run has kept are read, and so make the estimate shorter.

    Raises:
        TypeError: Neither settings of a training nor a trainer.
        ValueError: Whatever the training itself would refuse; or fewer than two warm-up steps.
    """
    from ragkit.estimate import command, memory, warm_up  # heavy: whoever reads an estimate needs none of it

    if isinstance(warmup_steps, bool) or not isinstance(warmup_steps, int) or warmup_steps < 2:
        raise ValueError(f"warmup_steps: found {warmup_steps!r}, expected 2 or more; the first one is not counted")
    device = command.device_of(what)
    with warm_up.left_as_it_was(device) as folder, memory.PeakMemory(device) as peak:
        if isinstance(what, Config):
            measured = command.measure_command(what, warmup_steps, folder)
        else:
            measured = command.measure_trainer(what, warmup_steps, folder)
        name, free = memory.device_name(device), memory.free_memory(device)
    config: Any = what if isinstance(what, Config) else what.config
    return _estimate(measured, config, peak.mib, name, free, memory.free_disk(config.output_dir))


def _estimate(found: Measured, config: Any, memory: float, device: str, free: float, disk: float) -> Estimate:
    taken = memory - found.copied_mib
    kept = min(found.saves, config.train.save_total_limit)
    # A new checkpoint is whole before an old one goes.
    most = found.checkpoint_mib * min(found.saves, kept + 1)
    warnings = []
    if taken > TIGHT * free:
        how = "does not fit" if taken > free else "fits barely"
        warnings.append(
            f"memory: about {size(taken)} {how} in {size(free)}; a smaller train.batch_size with more "
            "train.gradient_accumulation_steps takes less, and so does a smaller model"
        )
    if most > TIGHT * disk:
        how = "do not fit" if most > disk else "fit barely"
        warnings.append(
            f"disk: checkpoints of about {size(most)} {how} in {size(disk)}; make room, set output_dir to another "
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
