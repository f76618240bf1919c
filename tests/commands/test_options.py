"""Options of all commands: what --help says of them, and what is said of those there are not."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator

import pytest

from dyhead_cuda.__main__ import COMMANDS, main
from dyhead_cuda.commands.parsing import HINTS

WORDS = 3  # of a help that says something


def parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for name, command in COMMANDS.items():
        parser = argparse.ArgumentParser(prog=name)
        command.add_arguments(parser)
        yield name, parser


ARGUMENTS = [
    pytest.param(parser, action, id=f"{name} {'/'.join(action.option_strings) or action.dest}")
    for name, parser in parsers()
    for action in parser._actions
]


@pytest.mark.parametrize(("parser", "action"), ARGUMENTS)
def test_help_says_what_an_option_does_and_its_default(
    parser: argparse.ArgumentParser, action: argparse.Action
) -> None:
    assert action.help is not None
    text = action.help % {**vars(action), "prog": parser.prog}
    meaning = re.sub(r"\(default.*?\)|default: \S+", "", text)
    assert len(re.findall(r"[A-Za-z]{2,}", meaning)) >= WORDS, text
    default = action.default
    if default not in (None, False, argparse.SUPPRESS) and not isinstance(default, tuple | list):
        assert f"default: {default}" in text, f"expected the default, {default}, in: {text}"


# An option of another program, by the command it is given to, and a word of the answer.
GUESSES = {
    ("train", "--classes"): "classes come from the data",
    ("train", "--num_classes"): "classes come from the data",
    ("train", "--imgsz"): "--size",
    ("predict", "--img-size"): "--size",
    ("train", "--pretrained"): "--weights",
    ("train", "--resume"): "goes on by itself",
    ("train", "--output"): "--out",
    ("predict", "--model-path"): "--checkpoint",
    ("train", "--bakcbone"): "did you mean --backbone",
    ("train", "--batchsize"): "did you mean --batch-size",
    ("predict", "--Threshold"): "did you mean --threshold",
    ("train", "--val_images"): "did you mean --val-images",
    ("eval", "--conf"): "--threshold",
}


@pytest.mark.parametrize(("command", "option"), GUESSES)
@pytest.mark.parametrize("form", ["{}", "{}=3"])
def test_unknown_options_are_answered(
    command: str, option: str, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, form.format(option)])  # and nothing else, though much else is required
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"usage: python -m dyhead_cuda {command}")
    line = said.splitlines()[-1]
    assert f"error: unrecognized arguments: {option} (" in line
    assert GUESSES[command, option] in line


def test_what_resembles_nothing_has_no_hint(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["predict", "a.png", "--xyzzy", "--quux"])
    assert capsys.readouterr().err.endswith("unrecognized arguments: --xyzzy, --quux\n")


def test_files_after_two_dashes_are_no_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "--checkpoint", "no such run", "--", "--classes"]) == 2
    assert "unrecognized" not in capsys.readouterr().err


def test_hints_name_options_that_there_are() -> None:
    known = {name for _, parser in parsers() for name in parser._option_string_actions}
    for names, hint in HINTS.items():
        for option in re.findall(r"--[\w-]+", hint):
            assert option in known, hint
        assert not {f"--{name}" for name in names} & (known - {"--output", "--image"}), names
    every = [name for names in HINTS for name in names]
    assert len(every) == len(set(every))
