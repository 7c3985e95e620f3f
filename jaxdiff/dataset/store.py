"""Where a dataset is stored: the protocol that its writers keep to."""

from pathlib import Path
from typing import Protocol


class Store(Protocol):
    """A place for a dataset. Names are relative, with "/" between folders: see `names`.

    What is stored for good comes in three steps. A writer writes to a local path (`staging`) and
    makes it durable under a name that nobody reads (`stage`). Then it claims a name: of several
    writers the first one wins, and all learn who did. The winner's files get their own names
    (`publish`), which anyone may do again, after a crash as well.
    """

    def scratch(self, name: str) -> Path:
        """A new local path for a file or folder; nobody else gets the same."""

    def staging(self, attempt: str, name: str) -> Path:
        """The local path to which an attempt writes what is to be published as `name`."""

    def stage(self, attempt: str, name: str) -> None:
        """Makes what was written to `staging` durable."""

    def claim(self, name: str, content: str) -> str:
        """Creates a small file unless it is there; returns its content, which never changes."""

    def publish(self, attempt: str, name: str) -> None:
        """Gives what was staged its name. May be repeated, after the claim by anyone."""

    def swap(self, name: str, content: str) -> None:
        """Replaces a small file: its readers see the old content or the new one."""
