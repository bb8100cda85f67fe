"""What a process holds before any bundle: Python, numpy, onnxruntime and one trivial session, looked at from outside in a process of its own.

A fresh process is the only honest place to measure it, and one in which onnxruntime may crash (a wheel for another processor) without us.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass

TRIVIAL = bytes.fromhex(
    "080812003a330a0c0a0178120179220452656c751201675a0f0a0178120a0a08080112040a020801620f0a0179120a0a08080112040a02080142040a00100d"
)
"""An ONNX model of one node: y = Relu(x), float32 [1], opset 13."""

_CHILD = """
import json, os, sys
sys.path[:] = [entry for entry in sys.path if entry]
def held():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
def clean(folder):
    total, ours = 0, False
    try:
        with open("/proc/self/smaps", encoding="utf-8", errors="replace") as file:
            for line in file:
                name, *fields = line.split(None, 5)
                if not name.endswith(":"):
                    path = fields[4].strip() if len(fields) == 5 else ""
                    file_name = path.rsplit("/", 1)[-1]
                    ours = path.startswith(folder) and ".so" in file_name and "providers" not in file_name and fields[0] in ("r-xp", "r--p")
                elif ours and name == "Rss:":
                    size = int(fields[0]) * 1024
                elif ours and name == "Anonymous:" and fields[0] == "0":
                    total += size
    except OSError:
        pass
    return total
told = {"python": sys.version.split()[0], "bare": held()}
try:
    import numpy
    told.update(numpy=numpy.__version__, with_numpy=held())
    import onnxruntime
    told.update(onnxruntime=onnxruntime.__version__, with_onnxruntime=held())
    onnxruntime.set_default_logger_severity(3)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(sys.stdin.buffer.read(), options, providers=["CPUExecutionProvider"])
    ran = session.run(None, {"x": numpy.full(1, 2.5, numpy.float32)})[0].tolist() == [2.5]
    told.update(floor=held(), code=clean(os.path.realpath(os.path.dirname(onnxruntime.__file__)) + "/"))
    told.update(providers=onnxruntime.get_available_providers(), error="" if ran else "a trivial model gave a wrong result")
except Exception as reason:
    told["error"] = f"{type(reason).__name__}: {reason}"
print(json.dumps(told))
"""


@dataclass(frozen=True)
class Floor:
    """What the child found, bytes and versions; empty or 0 for what it did not come to.

    Attributes:
        python, numpy, onnxruntime: versions.
        bare, with_numpy, with_onnxruntime: resident bytes after each import.
        floor: after a trivial session ran.
        code: of that, clean pages of onnxruntime's library, which an adapter with a budget gives back.
        providers: onnxruntime's execution providers.
        error: why it did not come to its end; empty where it did.
    """

    python: str = ""
    numpy: str = ""
    onnxruntime: str = ""
    bare: int = 0
    with_numpy: int = 0
    with_onnxruntime: int = 0
    floor: int = 0
    code: int = 0
    providers: tuple[str, ...] = ()
    error: str = ""


def look(python: str = sys.executable, timeout: float = 120.0) -> Floor:
    """Starts a child and asks it.

    Args:
        python: the interpreter.
        timeout: seconds after which the child is ended: a slow card needs tens of them for the first import.
    """
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "1"}
    try:
        ended = subprocess.run([python, "-c", _CHILD], input=TRIVIAL, capture_output=True, timeout=timeout, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return Floor(error=f"onnxruntime did not load within {timeout:g} seconds")
    except OSError as reason:
        return Floor(error=f"{python} does not start: {reason.strerror}")
    if ended.returncode < 0:
        return Floor(error=f"loading onnxruntime ended the process ({_signal(-ended.returncode)}): its wheel does not fit this processor or system")
    try:
        told = json.loads(ended.stdout.decode().splitlines()[-1])
    except (ValueError, IndexError):
        return Floor(error=f"{python} ended with code {ended.returncode}: {ended.stderr.decode(errors='replace').strip()[-300:]}")
    return Floor(**{**told, "providers": tuple(told.get("providers", ()))})


_START = """
import sys
sys.path[:] = [entry for entry in sys.path if entry]
import numpy, onnxruntime
onnxruntime.set_default_logger_severity(3)
name = sys.argv[1]
session = onnxruntime.InferenceSession(sys.stdin.buffer.read(), providers=[name, "CPUExecutionProvider"], enable_fallback=0)
if name not in session.get_providers():
    sys.exit(1)  # onnxruntime has logged why
ran = session.run(None, {"x": numpy.full(1, 2.5, numpy.float32)})[0].tolist() == [2.5]
sys.exit(0 if ran else "a trivial model gave a wrong result")
"""


def start(provider: str, python: str = sys.executable, timeout: float = 120.0) -> str:
    """Has a child run a trivial model on one of onnxruntime's providers; why it does not, or "" where it does.

    Args:
        provider: its name, one of `Floor.providers`.
        python: the interpreter.
        timeout: seconds after which the child is ended.
    """
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "1"}
    command = [python, "-W", "ignore", "-c", _START, provider]
    try:
        ended = subprocess.run(command, input=TRIVIAL, capture_output=True, timeout=timeout, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return f"it did not start within {timeout:g} seconds"
    except OSError as reason:
        return f"{python} does not start: {reason.strerror}"
    if ended.returncode < 0:
        return f"it ended the process ({_signal(-ended.returncode)})"
    said = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", ended.stderr.decode(errors="replace")).splitlines() if line.strip()]
    told = next((line for line in said if "Failed to load library" in line or "CUDA failure" in line), said[-1] if said else "it does not say why")
    return "" if ended.returncode == 0 else re.sub(r"^.*?(Failed to load library|CUDA failure)", r"\1", told)


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
