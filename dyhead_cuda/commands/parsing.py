"""How a command line becomes a command that runs; shared with ``python -m benchmarks``."""

from __future__ import annotations

import argparse
import difflib
import importlib
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType, ModuleType

from dyhead_cuda.detection.lazy import is_own

# What others call it, without the dashes, and what it is called here.
HINTS = {
    ("classes", "nc", "ncls", "num-classes"): "classes come from the data",
    ("image-size", "img", "img-scale", "img-size", "imgsz", "input-size", "resolution"): (
        "train has --size and --max-size; other commands take what the model was trained with"
    ),
    ("pretrained", "pretrained-backbone"): (
        "train has --weights, DEFAULT for torchvision's backbones and pretrained for timm's"
    ),
    ("auto-resume", "continue", "resume", "resume-from"): (
        "a run goes on by itself when the same train command is given again; --out names it"
    ),
    ("exp", "name", "output", "output-dir", "project", "save-dir", "work-dir"): (
        "what is written goes to --out"
    ),
    ("ckpt", "load-from", "model-file", "model-path", "weight-file"): (
        "predict and attend have --checkpoint RUN; for eval and export RUN is the first argument"
    ),
    ("cfg", "config", "config-file"): "there are no files of settings, each is an option",
    ("annotation-file", "data-dir", "data-path", "data-root", "dataset", "root"): (
        "train and eval have --data FOLDER"
    ),
    ("bs", "batch", "samples-per-gpu"): "it is --batch-size",
    ("base-lr", "learning-rate", "lr0"): "train has --lr",
    ("iterations", "iters", "max-iter", "max-iters", "num-steps"): "train has --steps",
    ("max-epochs", "num-epochs"): "train has --epochs",
    ("fp16", "half", "mixed-precision"): "train has --amp fp16 and --amp bf16",
    ("gpu", "gpus", "gpu-id", "num-gpus"): (
        "--device cuda is one GPU, and torchrun -m dyhead_cuda train is several"
    ),
    ("conf", "conf-thres", "confidence", "min-score", "score-thr"): "predict has --threshold",
    ("image", "img-path", "input", "source", "video"): (
        "predict and attend have the files as arguments without a name"
    ),
    ("num-workers", "threads"): "train and eval have --workers",
}


def parse(
    parser: argparse.ArgumentParser,
    argv: Sequence[str],
    hints: Mapping[tuple[str, ...], str] = MappingProxyType({}),
) -> argparse.Namespace:
    """The arguments; an unknown one ends the process with the usage of the command it came after.

    Args:
        parser: whose commands set the default ``parser`` to their own one.
        argv: the command line.
        hints: by names of options that are often guessed, without dashes, what to do instead.

    Returns:
        The arguments, with the whole command line as ``command_line``.
    """
    command = _command(parser, argv)
    # First, as argparse would name an argument that is missing and not the one that is wrong.
    _check_options(command, argv, hints)
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        arguments.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    arguments.command_line = list(argv)
    return arguments


def _command(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> argparse.ArgumentParser | None:
    """The parser of the command that the first argument names; None without a command."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return action.choices.get(argv[0]) if argv else None
    return parser


def _check_options(
    command: argparse.ArgumentParser | None,
    argv: Sequence[str],
    hints: Mapping[tuple[str, ...], str],
) -> None:
    if command is None:
        return
    known = [name for name in command._option_string_actions if name.startswith("--")]
    words = argv[: argv.index("--")] if "--" in argv else argv  # after it there are only files
    given = [word.partition("=")[0] for word in words if re.match(r"--\w", word)]
    # argparse takes the beginning of a name for the name.
    unknown = [name for name in given if not any(full.startswith(name) for full in known)]
    if unknown:
        shown = [name + _hint(name, known, hints) for name in dict.fromkeys(unknown)]
        command.error(f"unrecognized arguments: {', '.join(shown)}")


def _hint(name: str, known: Sequence[str], hints: Mapping[tuple[str, ...], str]) -> str:
    """What to do instead of an unknown option, in brackets."""
    plain = name.removeprefix("--").replace("_", "-").lower()
    for names, hint in hints.items():
        if plain in names and f"--{plain}" not in known:
            return f" ({hint})"
    close = difflib.get_close_matches(f"--{plain}", known, 2)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def load(module: str, extra: str | None, parser: argparse.ArgumentParser) -> ModuleType:
    """The module of a command; where a package is missing, one line that says what to install.

    Args:
        module: its name.
        extra: of this project, with the packages that the command needs; None for none.
        parser: of the command; ends the process with status 2 and the line.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if extra is None or is_own(error):
            raise
        parser.exit(
            2, f"{parser.prog} needs {error.name}: run pip install 'dyhead_cuda[{extra}]'\n"
        )
