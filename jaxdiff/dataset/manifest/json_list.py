"""Reads a JSON list item by item, with two items' worth of text in memory."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import BinaryIO

from jaxdiff import checks
from jaxdiff.errors import InputError

MAX_ITEM_CHARACTERS = 2**20
SPACE = re.compile(r"[ \t\n\r]*")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


JSON = json.JSONDecoder(
    parse_constant=_refuse_constant, object_pairs_hook=checks.without_duplicates
)


def items(file: BinaryIO, name: str) -> Iterator:
    """Yields the items of a JSON list; bytes that are not UTF-8 become lone surrogates.

    Args:
      file: open at its beginning.
      name: of the file in messages.

    Raises:
      InputError: where the text is not a JSON list, or an item is longer than 1 MiB.
    """
    text, number = _Text(file, name), 0
    if text.next() != "[":
        raise InputError(f"manifest {name} is not a JSON list; use .jsonl for one object per line")
    mark = "]" if text.follows("]") else ","
    while mark == ",":
        number += 1
        try:
            yield text.value()
        except (RecursionError, ValueError) as problem:
            raise InputError(f"manifest {name} is not JSON ({problem} in item {number})") from None
        mark = text.next()
    if mark != "]" or text.next():
        raise InputError(f"manifest {name} is not JSON (after item {number}, the list goes wrong)")


def without_mark(content: bytes, name: str) -> bytes:
    """Removes UTF-8's byte order mark from the beginning of a file; refuses UTF-16."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"manifest {name} is UTF-16; save it as UTF-8")
    return content.removeprefix(b"\xef\xbb\xbf")


class _Text:
    """The text of a file from the current place on."""

    def __init__(self, file: BinaryIO, name: str):
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        start = without_mark(file.read(MAX_ITEM_CHARACTERS), name)
        self._text, self._place = self._decoder.decode(start), 0

    def next(self) -> str:
        """Returns the next character that is not a space, or "" at the end."""
        self._skip()
        self._place += 1
        return self._text[self._place - 1 : self._place]

    def follows(self, character: str) -> bool:
        """Moves past the character and returns True, if it is the next that is not a space."""
        self._skip()
        found = self._text.startswith(character, self._place)
        self._place += found
        return found

    def value(self):
        """Returns the next JSON value; raises ValueError or RecursionError."""
        self._skip()
        try:
            value, end = JSON.raw_decode(self._text, self._place)
        except json.JSONDecodeError as problem:
            if len(self._text) - self._place > MAX_ITEM_CHARACTERS:
                raise ValueError("more than 1 MiB, or no JSON,") from None
            raise ValueError(problem.msg.removesuffix(" at")) from None
        if end - self._place > MAX_ITEM_CHARACTERS:
            raise ValueError("more than 1 MiB")
        self._place = end
        return value

    def _skip(self) -> None:
        """Moves past spaces, and reads on until a whole item is in memory."""
        self._place = SPACE.match(self._text, self._place).end()
        while len(self._text) - self._place <= MAX_ITEM_CHARACTERS:
            chunk = self._file.read(MAX_ITEM_CHARACTERS)
            if not chunk:
                return
            self._text = self._text[self._place :] + self._decoder.decode(chunk)
            self._place = SPACE.match(self._text).end()
