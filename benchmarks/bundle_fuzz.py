"""How bundles and saved states from anywhere are borne: thousands of them, bent at random and by their structure, are opened in a process apart.

Each is either served or refused with an error that says why; nothing crashes, hangs, or takes more memory than it may. What is made follows from a
kind and a number alone: whatever goes wrong is had again by --kind and --number. Ends with 1 where anything went wrong.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.bundle_fuzz import KINDS, Made, Worker, complaint, make  # noqa: E402
from tests.fuzz_worker import Outcome  # noqa: E402


def kinds(examples: int, seed: int) -> list[str]:
    """Which are made, one after the other."""
    return Random(seed).choices(list(KINDS), [weight for _, _, weight in KINDS.values()], k=examples)


@dataclass
class Tally:
    """What became of them.

    Attributes:
        ended: by kind, how often they ended how.
        worst: the most bytes (resident; come meanwhile; come while files were only read) and seconds of one, and which that was.
        complaints: what must not have been.
    """

    ended: dict[str, Counter[str]] = field(default_factory=dict)
    worst: dict[str, tuple[float, str]] = field(default_factory=lambda: dict.fromkeys(("peak", "grown", "read", "seconds"), (0.0, "")))
    complaints: list[str] = field(default_factory=list)

    def add(self, made: Made, outcome: Outcome) -> None:
        """One more."""
        self.ended.setdefault(made.kind, Counter())[outcome["ended"]] += 1
        for key, (most, _) in self.worst.items():
            if outcome[key] > most:
                self.worst[key] = (outcome[key], f"{made.kind} {made.number}: {made.note[:80]}")
        if found := complaint(made, outcome):
            self.complaints.append(found)
            print(found, flush=True)

    def table(self) -> str:
        """All of it, for people."""
        rows = []
        for kind, count in self.ended.items():
            rows.append(f"{kind:<14}{count.total():>6}  {', '.join(f'{what} {times}' for what, times in count.most_common())}")
        for key, (most, which) in self.worst.items():
            rows.append(f"{key:<8} at most {f'{most:.2f} s' if key == 'seconds' else f'{most / 2**20:.1f} MiB'} ({which})")
        return "\n".join(rows)


def opened(wanted: Iterable[tuple[str, int]]) -> Tally:
    """Has these kinds and numbers made and opened, one after the other, until somebody interrupts it."""
    tally, worker = Tally(), Worker()
    place = Path(tempfile.mkdtemp(prefix="edgeadapt-fuzz-"))
    try:
        for kind, number in wanted:
            folder = place / "one"
            folder.mkdir()
            made = make(kind, number, folder)
            tally.add(made, worker.open(made))
            shutil.rmtree(folder)
    except KeyboardInterrupt:
        print("stopped")
    finally:
        worker.close()
        shutil.rmtree(place, ignore_errors=True)
    return tally


def main() -> int:
    """Prints a table; 1 where anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1000, help="how many are made (default: 1000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS, help="of this kind only")
    parser.add_argument("--number", type=int, help="with --kind: this one alone")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    choices = parser.parse_args()
    if choices.number is not None and choices.kind is None:
        parser.error("--number is of a kind: give --kind too")
    chosen = [choices.kind] * choices.examples if choices.kind else kinds(choices.examples, choices.seed)
    numbers = [choices.number] if choices.number is not None else [choices.seed * 10**6 + index for index in range(choices.examples)]
    begun = time.monotonic()
    tally = opened(zip(chosen, numbers))
    count = sum(each.total() for each in tally.ended.values())
    print(tally.table())
    print(f"{count} examples in {time.monotonic() - begun:.0f} s, {len(tally.complaints)} that went wrong")
    if choices.json:
        choices.json.write_text(json.dumps(vars(tally), indent=1) + "\n", encoding="utf-8")
    return int(bool(tally.complaints))


if __name__ == "__main__":
    sys.exit(main())
