"""What the daemon keeps on the disk, such that a power cut at any moment leaves a good state to start from; docs/state.md says how."""

from __future__ import annotations

from edgeadapt.runtime.daemon.store.folder import Store
from edgeadapt.runtime.daemon.store.terms import Boot, Installation, Limits

__all__ = ["Boot", "Installation", "Limits", "Store"]
