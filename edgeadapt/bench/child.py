"""A row of the bench that is served by a process of its own, so that its memory is that of serving alone: no data set, no corruptions.

The child asks for each frame when it wants it, so that frames are made while it waits, and the times that it tells are of serving only. When this
process goes, the child finds its pipe closed and ends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import IO, Any

from numpy.typing import NDArray

from edgeadapt import errors
from edgeadapt.bench.runner import Answer, Row
from edgeadapt.bench.setting import Setting
from edgeadapt.bench.wire import receive, send
from edgeadapt.errors import BudgetError, EdgeAdaptError
from edgeadapt.progress import Progress, quiet

CHILD = "edgeadapt.runtime.benched"
"""The module that serves; it is run, not imported, because it needs onnxruntime."""


class Child(Row):
    """A row in a process of its own.

    Args:
        setting: what is served.
        progress: told how preparing goes.
    """

    def __init__(self, setting: Setting, progress: Progress = quiet) -> None:
        self._setting, self._progress = setting, progress
        self._facts: dict[str, Any] = {}

    def serve(self, frames: Iterator[NDArray[Any]]) -> Iterator[Answer]:
        """As `runner.Row`.

        Raises:
            EdgeAdaptError: of the kind that the child met; BudgetError where the system ended it.
        """
        environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "1"}
        environment |= {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
        command = [sys.executable, "-m", CHILD, json.dumps(asdict(self._setting))]
        with tempfile.TemporaryFile() as said:
            # a group of its own: Ctrl-C is for this process, which then closes the pipe
            child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, env=environment, start_new_session=True)
            try:
                yield from self._answers(child, frames)
                if child.wait() or not self._facts:
                    raise _failed(child.returncode, said)
            finally:
                child.kill()
                for pipe in (child.stdin, child.stdout):
                    _close(pipe)
                child.wait()

    def facts(self) -> Mapping[str, Any]:
        return self._facts

    def _answers(self, child: subprocess.Popen[bytes], frames: Iterator[NDArray[Any]]) -> Iterator[Answer]:
        assert child.stdin is not None
        assert child.stdout is not None
        while (message := receive(child.stdout)) is not None:  # type: ignore[arg-type]
            kind, values, array = message
            if kind == "next":
                frame = next(frames, None)
                try:
                    send(child.stdin, "end" if frame is None else "frame", None, frame)  # type: ignore[arg-type]
                except BrokenPipeError:
                    return
            elif kind == "answer":
                yield Answer(array, **values)
            elif kind == "progress":
                self._progress(**values)
            elif kind == "error":
                raise _as_error(**values)
            elif kind == "facts":
                self._facts = values


def prepare(setting: Setting, progress: Progress = quiet) -> Mapping[str, Any]:
    """Has the graphs that a setting needs optimised for this machine, where they are not yet.

    Returns:
        "exported": those for which that could not be done.

    Raises:
        EdgeAdaptError: the bundle cannot be opened with this setting.
    """
    child = Child(replace(setting, prepare=True), progress)
    for _ in child.serve(iter(())):
        pass
    return child.facts()


def _as_error(code: int, message: str, hint: str) -> EdgeAdaptError:
    kinds = {kind.exit_code: kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, EdgeAdaptError)}
    return kinds.get(code, EdgeAdaptError)(message, hint)


def _failed(code: int, said: IO[bytes]) -> EdgeAdaptError:
    said.seek(0)
    lines = said.read().decode(errors="replace").strip().splitlines()
    if code == -9:
        return BudgetError("the serving process was ended by the system", "there is not enough memory on this machine for it: give a smaller --batch")
    reason = lines[-1] if lines else "it said nothing"
    return EdgeAdaptError(f"the serving process ended with {code}: {reason}", "run the bundle with edgeadapt run to see more")


def _close(pipe: IO[bytes] | None) -> None:
    try:
        if pipe is not None:
            pipe.close()
    except OSError:  # what was still to be written has nobody to read it
        pass
