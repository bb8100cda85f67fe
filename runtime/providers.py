"""What sessions run on: the CPU, or onnxruntime's CUDA provider with the CPU for nodes that it lacks. Never the CPU in silence."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import onnxruntime

from edgeadapt.errors import EdgeAdaptError, UsageError
from edgeadapt.memory import cuda

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"

_LOCK = threading.Lock()
_STARTED: set[str] = set()


def options(limit: int) -> dict[str, str]:
    """The CUDA provider's options: all that bounds its memory, and numbers that are the CPU's but for rounding.

    Args:
        limit: bytes of the GPU's memory for one session's arena; 0: no limit.
    """
    return {
        "device_id": "0",
        **({"gpu_mem_limit": str(limit)} if limit else {}),
        "arena_extend_strategy": "kSameAsRequested",  # the other takes powers of two, and meets the limit earlier
        "cudnn_conv_algo_search": "HEURISTIC",  # the exhaustive one tries them all: memory beside the limit, and another choice from run to run
        "cudnn_conv_use_max_workspace": "0",  # a convolution gets 32 MiB of workspace, not all there is
        "do_copy_in_default_stream": "1",  # copies are done when a run begins and ends
        "use_tf32": "0",  # its products keep ten bits of a float32; the exporter's check allows for no such difference
    }


def arguments(limit: int | None) -> dict[str, Any]:
    """For `onnxruntime.InferenceSession`: the providers, and that it must not take others.

    Args:
        limit: as `options` takes it; None: the CPU only.
    """
    if limit is None:
        return {"providers": [CPU]}
    return {"providers": [(CUDA, options(limit)), CPU], "enable_fallback": 0}


def checked(session: Any, what: str) -> Any:
    """A session that was made for the CUDA provider, if it has it: onnxruntime makes one without where that does not start, and only logs why.

    Raises:
        EdgeAdaptError: it has not.
    """
    if CUDA not in session.get_providers():
        raise not_started(f"{what} would run on the CPU")
    return session


def not_started(what: str) -> EdgeAdaptError:
    """The CUDA provider is there and does not start."""
    return EdgeAdaptError(
        f"onnxruntime {onnxruntime.__version__} has the CUDA provider, but it does not start: {what}",
        "install the driver, CUDA and cuDNN of the releases that this onnxruntime asks for (docs/providers.md); or take the provider cpu",
    )


def require(provider: str) -> bool:
    """Whether graphs are to run on CUDA, which this onnxruntime then has; that it starts, `start` finds out.

    Raises:
        UsageError: there is no such provider, or onnxruntime was built without it.
    """
    if not cuda.is_cuda(provider):
        return False
    if CUDA not in (present := onnxruntime.get_available_providers()):
        raise UsageError(
            f"this onnxruntime ({onnxruntime.__version__}) has no CUDA provider, only {', '.join(present)}",
            "pip uninstall onnxruntime; pip install onnxruntime-gpu; on a Jetson with JetPack 6 from the Jetson AI Lab's index (docs/providers.md)",
        )
    return True


def start() -> None:
    """Has the CUDA provider run a graph of one node, once a process, so that what fails then is the provider's fault and not the bundle's.

    Raises:
        EdgeAdaptError: it does not.
    """
    from edgeadapt.devices.boards import floor

    with _LOCK:
        if CUDA in _STARTED:
            return
        chosen = onnxruntime.SessionOptions()
        chosen.log_severity_level = 4
        onnxruntime.set_default_logger_severity(4)
        try:
            session = onnxruntime.InferenceSession(floor.TRIVIAL, chosen, **arguments(2**20))
            if CUDA not in session.get_providers():
                raise not_started(floor.start(CUDA) or "onnxruntime does not say why")  # a child process hears what onnxruntime logs
            session.run(None, {"x": np.ones(1, np.float32)})
        except EdgeAdaptError:
            raise
        except Exception as reason:  # onnxruntime's own types have no common base of theirs
            raise not_started(next(iter(str(reason).splitlines()), "")) from None
        finally:
            onnxruntime.set_default_logger_severity(3)
        _STARTED.add(CUDA)


def device(unified: bool | None = None) -> cuda.Device:
    """The GPU of this machine.

    Args:
        unified: whether it shares the board's memory; None looks.
    """
    if unified is None:
        from edgeadapt.devices import boards

        unified = boards.here().unified_gpu
    return cuda.Device(unified, CUDA in _STARTED)
