"""`python -m ragkit.estimate COMMAND [config.yaml] [key=value ...] [--json [FILE]]`: what the command will take."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import ragkit.estimate
from ragkit.commands import COMMANDS
from ragkit.compat.gfmrag import as_config
from ragkit.config import Config, GFMFinetuneConfig, GFMPretrainConfig, LSRConfig, RALTConfig, load_config
from ragkit.console import explain, silence_libraries
from ragkit.files import atomic_write_json
from ragkit.inputs import CommandError

TRAININGS = (LSRConfig, RALTConfig, GFMPretrainConfig, GFMFinetuneConfig)


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
            print(ragkit.estimate.__doc__)
            return 0 if given else 2
        found = ragkit.estimate.estimate(_settings(given[0], given[1:]))
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
