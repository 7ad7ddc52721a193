"""A directory that appears whole or not at all: written beside its place, and renamed when it is complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from fxpipe.errors import WeightsError
from fxpipe.runtime.weights.disk.files import cannot_write, sync_directory
from fxpipe.runtime.weights.ranks import Everyone

SPARE = 1 << 20
"""Bytes of headers and manifest that a save may need besides the tensors."""


class Target:
    """Where a save goes; every rank has one.

    Args:
        path: The directory, which must not exist.
        everyone: All ranks that write.
    """

    def __init__(self, path: str | os.PathLike[str], everyone: Everyone) -> None:
        self.everyone = everyone
        self.path = Path()
        self._is_made = False
        self._error: Exception | None = None
        try:
            self.path = new_path(path)
        except WeightsError as error:  # raised where the ranks agree: on another the path may be right
            self._error = error

    @property
    def part(self) -> Path:
        """The directory that is written to; what an interrupted save left there is thrown away by the next."""
        return self.path.with_name(f".{self.path.name}.part")

    def make(self, nbytes: int, error: Exception | None = None) -> None:
        """Make the directory to write to.

        Args:
            nbytes: What all ranks will write there.
            error: What went wrong on this rank before.

        Raises:
            WeightsError: On every rank: the target exists, cannot be made, or has too little room; or ``error``.
        """
        error = error or self._error
        if error is None and self.everyone.position == 0:
            try:
                self._make(nbytes)
            except Exception as found:  # whatever it is, the other ranks must not wait for this one
                error = found
        self.agree(error, "where to save", str(self.path))

    def _make(self, nbytes: int) -> None:
        try:
            if self.path.exists() or self.path.is_symlink():
                raise WeightsError(
                    f"{self.path} exists\n  save makes a new directory: give another name, or remove it first"
                )
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.part.exists():
                shutil.rmtree(self.part)
            free = shutil.disk_usage(self.path.parent).free
            if free < nbytes + SPARE:
                raise WeightsError(
                    f"{self.path.parent} has room for {free:,} bytes, and {nbytes + SPARE:,} are to be written\n"
                    "  make room, or give a directory on another disk; nothing was written"
                )
            self.part.mkdir()
            self._is_made = True
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def agree(self, error: Exception | None, subject: str = "what was saved", *parts: object) -> None:
        """Go on with all ranks, or remove what was written and raise on all of them."""
        try:
            self.everyone.agree(error, subject, *parts)
        except Exception:
            if self._is_made:
                shutil.rmtree(self.part, ignore_errors=True)
            self.everyone.gather(None)  # no rank goes on while something is left
            raise

    def finish(self, last: Callable[[Path], None]) -> None:
        """Put the directory in its place, once every rank has agreed that its part is written.

        Args:
            last: Writes, on the first rank, the file without which the directory counts for nothing.

        Raises:
            WeightsError: On every rank; nothing is left then.
        """
        error: Exception | None = None
        if self.everyone.position == 0:
            try:
                last(self.part)
                self._rename()
            except Exception as found:
                error = found
        self.agree(error)

    def _rename(self) -> None:
        try:
            sync_directory(self.part)
            self.part.rename(self.path)
            sync_directory(self.path.parent)
        except OSError as error:
            raise cannot_write(self.path, error) from error


def new_path(path: str | os.PathLike[str]) -> Path:
    """Give the path of something that is to be written, whole: a save in the background outlives a change of directory.

    Raises:
        WeightsError: It is no path, or names nothing that could be made.

    >>> new_path("/runs/first")
    PosixPath('/runs/first')
    >>> new_path("")
    Traceback (most recent call last):
    fxpipe.errors.WeightsError: '' is no path of something new
      give the name of a directory that does not exist
    """
    if isinstance(path, str | os.PathLike) and "\0" not in os.fspath(path) and os.fspath(path):
        place = Path(os.path.abspath(path))
        if place.name:
            return place
    raise WeightsError(f"{path!r} is no path of something new\n  give the name of a directory that does not exist")
