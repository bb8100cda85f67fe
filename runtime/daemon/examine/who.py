"""What a user may do with files, also one that we are not. Nothing is opened."""

from __future__ import annotations

import os
import pwd
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Who:
    """A user.

    Attributes:
        name: how it is told.
        uid: None: one that systemd makes when the daemon starts.
        groups: numbers of its groups.
        ours: it is the one that asks, so that the kernel knows.
    """

    name: str
    uid: int | None
    groups: frozenset[int]
    ours: bool = False

    @property
    def login(self) -> str:
        """Its name as commands take it; "" of one that systemd makes."""
        return "" if self.uid is None else user_name(self.uid)

    def may(self, path: str | os.PathLike[str], wanted: int) -> bool | None:
        """Whether it may do what `os.access` calls `wanted` with what is there, by owners and modes; None where we may not see that.

        What access control lists allow beyond the modes is not seen, unless it is us.
        """
        if self.ours:
            return os.access(path, wanted)
        place = os.path.realpath(path)
        try:
            on_the_way = all(self._allowed(os.stat(folder), os.X_OK) for folder in Path(place).parents)
            return on_the_way and self._allowed(os.stat(place), wanted)
        except PermissionError:
            return None
        except OSError:
            return False

    def _allowed(self, status: os.stat_result, wanted: int) -> bool:
        """Root is asked as others are: the unit takes away what makes it more."""
        shift = 6 if status.st_uid == self.uid else 3 if status.st_gid in self.groups else 0
        return (status.st_mode >> shift) & wanted == wanted


def ourselves() -> Who:
    """Who asks."""
    return Who(f"user {user_name(os.getuid())}", os.getuid(), frozenset({*os.getgroups(), os.getgid()}), True)


def named(user: str, groups: Sequence[str]) -> Who | None:
    """The user of that name or number, with groups beside its own; None where there is none.

    Args:
        user: the name.
        groups: names of groups that are given in addition.
    """
    try:
        entry = pwd.getpwuid(int(user)) if user.isdecimal() else pwd.getpwnam(user)
    except KeyError:
        return None
    own = frozenset(os.getgrouplist(entry.pw_name, entry.pw_gid))
    return Who(f"user {entry.pw_name}", entry.pw_uid, own | _numbers(groups))


def made(groups: Sequence[str]) -> Who:
    """The user that systemd makes for a unit with DynamicUser=yes."""
    return Who("the user that systemd makes", None, _numbers(groups))


def _numbers(groups: Sequence[str]) -> frozenset[int]:
    import grp

    found = set()
    for name in groups:
        with suppress(KeyError):
            found.add(grp.getgrnam(name).gr_gid)
    return frozenset(found)


def user_name(uid: int) -> str:
    """A user's name, or its number where it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def group_name(gid: int) -> str:
    """A group's name, or its number where it has none."""
    import grp

    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def belongs(path: str | os.PathLike[str]) -> str:
    """Whose something is and with what mode, as "root:dialout, crw-rw----"; "unknown" where that cannot be seen."""
    try:
        status = os.stat(path)
    except OSError:
        return "unknown"
    return f"{user_name(status.st_uid)}:{group_name(status.st_gid)}, {stat.filemode(status.st_mode)}"
