"""The budgets of a process's adapters: what each has been promised, and what they may come to hold together."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from edgeadapt.errors import BudgetError
from edgeadapt.memory import footprint
from edgeadapt.memory.ledger import Ledger
from edgeadapt.units import format_bytes


class Claim:
    """One adapter's claim on the process's budget, until it is released or collected.

    Attributes:
        budget: the most bytes the process may hold resident.
        planned: what was opened under it may come to hold, in bytes, without `code`. 0: nothing yet.
        code: of onnxruntime's library, which all share.
        filled: what the process may come to hold by it and by those that were living when it was opened.
        besides: what the process held when it was opened, without what any adapter may come to hold.
        on_device: of `planned`, what lies in a GPU's share of the memory and is not resident.
    """

    def __init__(self, owner: Claims, budget: int) -> None:
        self._owner, self.budget = owner, budget
        self.planned = self.filled = self.besides = self.on_device = self.code = 0

    def promised(self) -> int:
        """What the process may come to hold by what was opened under any living claim, in bytes."""
        living = self._owner.living()
        if not living:
            return 0
        return max(claim.besides for claim in living) + sum(claim.planned for claim in living) + max(claim.code for claim in living)

    def before(self, without: Claim | None = None) -> int:
        """What the process has promised besides the code that one more adapter would share, in bytes; without: what is promised to that one."""
        shared = min(max((claim.code for claim in self._owner.living()), default=0), footprint.CODE)
        return self.promised() - shared - (without.planned if without is not None else 0)

    def fill(self, held: int, ledger: Ledger) -> None:
        """Notes what is opened under it.

        Args:
            held: what the process held before, or had promised.
            ledger: what is added.
        """
        others = sum(claim.planned for claim in self._owner.living() if claim is not self)
        self.filled, self.besides = held + ledger.total, held - others
        self.code, self.on_device = ledger.shared, ledger.on_device
        self.planned = ledger.total - ledger.passing - self.code

    def resident(self) -> tuple[int, int]:
        """(of the budget, of what was promised) what may be resident: all but what lies in a GPU's share of the memory."""
        away = sum(claim.on_device for claim in self._owner.living())
        return self.budget - away, self.promised() - away

    def release(self) -> None:
        """Gives it back; a second time nothing happens."""
        self._owner.drop(self)


class Claims:
    """The budgets of a process's living adapters. The budget bounds the process, so they must all have the same one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: weakref.WeakSet[Claim] = weakref.WeakSet()

    @contextmanager
    def taken(self, budget: int) -> Iterator[Claim]:
        """A claim, released again if what is done with it raises.

        Raises:
            BudgetError: another budget is claimed in this process.
        """
        with self._lock:
            for other in self._held:
                if other.budget != budget:
                    raise BudgetError(
                        f"this process has an adapter with a budget of {format_bytes(other.budget)}; a second one cannot have {format_bytes(budget)}",
                        "close the first, give both the same budget, or open the second in another process",
                    )
            claim = Claim(self, budget)
            self._held.add(claim)
        try:
            yield claim
        except BaseException:
            claim.release()
            raise

    def living(self) -> list[Claim]:
        """All that are held."""
        with self._lock:
            return list(self._held)

    def drop(self, claim: Claim) -> None:
        """Lets go of one."""
        with self._lock:
            self._held.discard(claim)


CLAIMS = Claims()
"""Those of this process."""
