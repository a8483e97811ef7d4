"""Unpacks gzip as far as it goes. Python's ``gzip`` raises where a file is cut off, and what it had read is lost."""

from __future__ import annotations

import io
import zlib
from typing import Any, BinaryIO

_CHUNK = 1 << 16
_GZIP = 31  # zlib's wbits for a gzip header and trailer


class Gunzip(io.RawIOBase):
    """A stream of what a gzip stream holds: of all members, one after the other.

    Args:
        packed: the gzip stream.

    Attributes:
        is_cut: whether it ended inside a member; known once all was read.
    """

    def __init__(self, packed: BinaryIO) -> None:
        self._packed, self._waiting = packed, b""
        self._member: Any = None
        self.is_cut = False

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Unpack into a buffer; 0 at the end.

        Raises:
            zlib.error: the data are damaged, or are followed by something else.
        """
        found = self._next(len(buffer))
        buffer[: len(found)] = found
        return len(found)

    def _next(self, most: int) -> bytes:
        while True:
            self._waiting = self._waiting or self._packed.read(_CHUNK)
            is_end = not self._waiting
            if self._member is None:
                self._waiting = self._waiting.lstrip(b"\0")  # members may be padded with zeros
                if is_end:
                    return b""
                if not self._waiting:
                    continue
                self._member = zlib.decompressobj(_GZIP)
            found: bytes = self._member.decompress(self._waiting, most)
            if self._member.eof:
                self._waiting, self._member = self._member.unused_data, None
            else:
                self._waiting = self._member.unconsumed_tail
            if found:
                return found
            if is_end:
                self.is_cut = self._member is not None
                return b""
