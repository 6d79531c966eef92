"""Errors are one short line, whatever they quote."""

import pickle

import pytest

from tarvis import cli
from tarvis.config import ConfigError
from tarvis.structures import LONGEST_MESSAGE, InputError, one_line

HOSTILE = [
    "a\x1b[31mred",
    "a\nb",
    "a\r\nb",
    "a\x00b",
    "\udcff",
    "a\u202eb",
    "\x9b2J",
    "a\tb",
    "x" * 10**6,
]


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
@pytest.mark.parametrize("kind", [InputError, ConfigError])
def test_a_message_is_one_line_of_printable_characters(kind, name, capsys):
    message = str(kind(f"{name}: expected a mask"))
    assert len(message) <= LONGEST_MESSAGE
    assert message.isprintable()
    assert message.endswith(": expected a mask")
    assert one_line(message) == message
    assert str(pickle.loads(pickle.dumps(kind(message)))) == message
    assert cli.fail(f"{name}: expected") == 2
    assert capsys.readouterr().err.rstrip("\n").isprintable()


def test_escapes_show_what_was_there():
    assert str(InputError("a\x1b[31m\udcff.png: é")) == r"a\x1b[31m\udcff.png: é"


def out_of_memory():
    raise MemoryError


def no_room():
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: not enough memory: 8 bytes")


@pytest.mark.parametrize("action", [out_of_memory, no_room])
def test_full_memory_is_one_line(action, capsys):
    assert cli.run(action) == 2
    assert capsys.readouterr().err.startswith("error: out of memory: try a smaller")
