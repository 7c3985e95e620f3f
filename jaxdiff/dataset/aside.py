"""Moves a shard that cannot be trusted aside while it is made anew, so that nothing is lost."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from jaxdiff.dataset import names, paths
from jaxdiff.dataset import shard as shards
from jaxdiff.dataset.run import Run


class Aside:
    """A shard's done-markers and files, moved out of the way.

    Args:
      wanted: the digests of what its revisions held (`Marker.content`), one of which the new shard
        must hold; if there are none, it may hold anything.
    """

    def __init__(self, run: Run, shard: int, wanted: Sequence[str]):
        self.shard = shard
        self._run, self._wanted = run, wanted
        self._moved: dict[Path, Path] = {}
        for path in self._paths():
            self._moved[path] = run.store.scratch(f"aside-{len(self._moved)}")
            os.rename(path, self._moved[path])

    def _paths(self) -> list[Path]:
        """Returns the paths that exist, whatever is there, and markers after a gap too."""
        files = [self._run.store.path(name) for name in self._run.file_names(self.shard)]
        marker = re.compile(rf"{self.shard:05d}(\.r[0-9]+)?\.json")
        markers = self._run.store.path(names.DONE).glob("*")
        found = [*files, *(path for path in sorted(markers) if marker.fullmatch(path.name))]
        return [path for path in found if os.path.lexists(path)]

    def is_replaced(self) -> bool:
        """Returns whether the shard was made anew, with contents that are wanted."""
        new = shards.read_marker(self._run, self.shard)
        return new is not None and (not self._wanted or new.content in self._wanted)

    def is_reverted(self) -> bool:
        """Returns whether the new shard holds what an earlier revision did, not the last."""
        new = shards.read_marker(self._run, self.shard)
        return bool(self._wanted) and new.content != self._wanted[-1]

    def put_back(self) -> None:
        """Deletes the new shard, if there is one, and moves the old one back."""
        for path in self._paths():
            paths.delete(path)
        for path, moved in self._moved.items():
            os.rename(moved, path)

    def drop(self) -> None:
        """Deletes the old shard."""
        for moved in self._moved.values():
            paths.delete(moved)
