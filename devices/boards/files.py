"""Files of /proc and /sys under a root that tests can fake; what is missing or may not be read is empty."""

from __future__ import annotations

import os
from pathlib import Path


class Files:
    """Reads small files.

    Args:
        root: the folder that stands for "/".
    """

    def __init__(self, root: str | os.PathLike[str] = "/") -> None:
        self._root = Path(root)

    def data(self, path: str, most: int = 1 << 20) -> bytes:
        """The first bytes of a file; none where it cannot be read."""
        try:
            with (self._root / path).open("rb") as file:
                return file.read(most)
        except OSError:
            return b""

    def text(self, path: str) -> str:
        """A file's text without a device tree's closing zero."""
        return self.data(path).decode(errors="replace").rstrip("\0")

    def line(self, path: str) -> str:
        """A file of one line."""
        return self.text(path).strip()

    def number(self, path: str) -> int | None:
        """A file that holds one whole number; None where it does not ("max")."""
        text = self.line(path)
        return int(text) if text.isdecimal() else None

    def table(self, path: str) -> dict[str, int]:
        """Lines of a name and a whole number; anything after these is dropped."""
        found = {}
        for line in self.text(path).splitlines():
            words = line.replace(":", " ").split()
            if len(words) >= 2 and words[1].isdecimal():
                found[words[0]] = int(words[1])
        return found

    def exists(self, path: str) -> bool:
        """Whether there is such a file or folder."""
        return os.path.lexists(self._root / path)

    def is_folder(self, path: str) -> bool:
        """Whether there is such a folder."""
        return (self._root / path).is_dir()

    def names(self, folder: str) -> list[str]:
        """What a folder holds, sorted."""
        try:
            return sorted(os.listdir(self._root / folder))
        except OSError:
            return []
