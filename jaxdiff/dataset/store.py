"""The storage of a dataset, and the protocol of its writers."""

from pathlib import Path
from typing import Protocol


class Store(Protocol):
    """Storage for a dataset. Names are relative, with "/" between folders: see `names`.

    Files are committed in three steps. A writer writes to a local path (`staging`) and makes the
    file durable under a name that nobody reads (`stage`). Then it claims a name (`claim`): the
    first of several writers wins, and all learn which one did. Finally, the winner's files get
    their final names (`publish`); anyone may repeat this step, even after a crash.
    """

    def scratch(self, name: str) -> Path:
        """Returns a new, unique local path for a file or folder."""

    def staging(self, attempt: str, name: str) -> Path:
        """Returns the local path where an attempt writes the file to publish as `name`."""

    def stage(self, attempt: str, name: str) -> None:
        """Makes the file at `staging` durable."""

    def claim(self, name: str, content: str) -> str:
        """Creates a small file unless it exists; returns its content, which never changes."""

    def publish(self, attempt: str, name: str) -> None:
        """Gives a staged file its final name; anyone may repeat this after the claim."""

    def swap(self, name: str, content: str) -> None:
        """Replaces a small file atomically: readers see the old content or the new."""
