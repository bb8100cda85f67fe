"""The bundle that the next start begins with. The state folder is read as it is; nothing is locked, made or counted."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgeadapt import plainfile
from edgeadapt.errors import EdgeAdaptError
from edgeadapt.runtime.daemon.examine.terms import Found, Site
from edgeadapt.runtime.daemon.examine.who import belongs
from edgeadapt.units import format_bytes, format_count

if TYPE_CHECKING:
    from edgeadapt.bundle import Bundle
    from edgeadapt.runtime.daemon.store.pointer import Installed, Pointer

SUBJECT = "bundle"


def look(site: Site, found: list[Found]) -> Bundle | None:
    """The one that would be served; what there is to say of it is added to `found`."""
    outside = site.config.bundle.path
    if outside is not None:
        return _named(site, outside, found)
    folder = site.config.state.folder
    if not os.path.lexists(folder):
        found.append(Found(SUBJECT, "fault", f"none is installed, for there is no {folder}: there is nothing to predict with", _install(site)))
        return None
    if not os.access(folder, os.R_OK | os.X_OK):
        return None  # what there is to say of the folder says it
    from edgeadapt.runtime.daemon.store.pointer import COPIES, Pair

    if unseen := _unseen(site, [folder / name for name in COPIES]):
        found.append(unseen)
        return None
    try:
        pointer = Pair(folder).read()
    except EdgeAdaptError as reason:
        found.append(Found(SUBJECT, "fault", f"which one is installed cannot be read: {reason.message}", reason.hint))
        return None
    if pointer.active is None:
        found.append(Found(SUBJECT, "fault", f"none is installed in {folder}: there is nothing to predict with", _install(site)))
        return None
    return _installed(site, pointer, pointer.active, found)


def _install(site: Site) -> str:
    return f"sudo edgeadapt install model.edgeadapt{site.option}"


def _named(site: Site, path: Path, found: list[Found]) -> Bundle | None:
    from edgeadapt.bundle import Bundle, signing

    keys = _keys(site)
    try:
        bundle = signing.check(path, keys) if keys else Bundle.open(path)
    except EdgeAdaptError as reason:
        found.append(Found(SUBJECT, "fault", f"{reason.message}: no frame is answered", reason.hint))
        return None
    found += _readable(site, bundle)
    found.append(_fine(bundle, bool(keys), "as bundle.path names it"))
    return bundle


def _installed(site: Site, pointer: Pointer, active: Installed, found: list[Found]) -> Bundle | None:
    from edgeadapt.runtime.daemon.store import installing

    folder, keys = site.config.state.folder, _keys(site)
    if unseen := _unseen(site, [installing.place(folder, active)]):
        found.append(unseen)
        return None
    try:
        bundle = installing.opened(folder, active, keys)
    except EdgeAdaptError as reason:
        found.append(_damaged(site, pointer, reason))
        return None
    found += _readable(site, bundle)
    trial = "on trial" if active.trial else "installed"
    found.append(_fine(bundle, bool(keys), trial))
    most = site.config.state.boots
    if pointer.boots > 1:
        text = f"{format_count(pointer.boots, 'start')} in a row did not prove themselves; after {most} it begins with something else"
        found.append(Found(SUBJECT, "warning", text, "journalctl -u edgeadapt says how they ended"))
    return bundle


def _damaged(site: Site, pointer: Pointer, reason: EdgeAdaptError) -> Found:
    from edgeadapt.runtime.daemon.store import installing

    if pointer.previous is not None:
        try:
            before = installing.opened(site.config.state.folder, pointer.previous, _keys(site))
        except EdgeAdaptError:
            pass
        else:
            text = f"{reason.message}: the next start begins with the one before, {before.manifest.model.name} ({before.digest[:12]})"
            return Found(SUBJECT, "warning", text, reason.hint or _install(site))
    return Found(SUBJECT, "fault", f"{reason.message}: no frame is answered", reason.hint or _install(site))


def _unseen(site: Site, paths: Sequence[Path]) -> Found | None:
    """That we may not read what the daemon may, where that is so."""
    if site.who is not None and site.who.ours:
        return None  # what we may not read the daemon may not
    for path in paths:
        seen = plainfile.present(path)  # what is in a closed folder seems not to be there
        if not os.access(seen, os.R_OK if seen == path else os.X_OK):
            return Found(SUBJECT, "warning", f"you may not read {path}, so that it is not looked at", "sudo edgeadapt doctor")
    return None


def _readable(site: Site, bundle: Bundle) -> Iterator[Found]:
    folder = site.config.state.folder
    given = site.made(str(folder), "state") and bundle.path.is_relative_to(os.path.realpath(folder))  # by systemd, at the first start
    if site.who is not None and not given and site.who.may(bundle.path, os.R_OK) is False:
        text = f"{bundle.path} ({belongs(bundle.path)}): {site.who.name} may not read it, so that no frame is answered"
        yield Found(SUBJECT, "fault", text, "chmod o+r it, and o+x the folders on the way; or install it: edgeadapt install")


def _fine(bundle: Bundle, signed: bool, how: str) -> Found:
    manifest = bundle.manifest
    whole = "whole, and signed by a key that is trusted" if signed else "whole"
    method = f"adapts by {manifest.method.name}" if manifest.planned("adapt") else "only predicts"
    size = format_bytes(os.stat(bundle.path).st_size)
    return Found(SUBJECT, "fine", f"{manifest.model.name} ({bundle.digest[:12]}), {how}, {size}, {whole}; {method}")


def _keys(site: Site) -> tuple[Path, ...]:
    return site.config.bundle.keys if site.config.bundle.require_signature else ()


def sizes(bundle: Bundle | None) -> tuple[int, int]:
    """Bytes of a learned state, with what a guard saves beside it, and of the bundle; 0 where there is none."""
    if bundle is None:
        return 0, 0
    return 2 * sum(spec.nbytes for spec in bundle.manifest.state), os.stat(bundle.path).st_size
