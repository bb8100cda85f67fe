"""The user's model: built by a function of theirs, and filled from a weights file that is never executed.

A factory runs the user's own code, which is what they ask for by naming it. A weights file may come from anywhere, so it is read as tensors only:
safetensors, or torch's own format through its restricted reader.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from edgeadapt.errors import ExportError, InputError, UsageError
from edgeadapt.units import format_shape

TORCH_FILES = (".pt", ".pth", ".bin", ".ckpt")
WRAPPERS = ("state_dict", "model_state_dict", "model")
COUNTER = "num_batches_tracked"  # of no use in eval mode, and absent from many files
SHOWN = 4


def one_line(error: BaseException) -> str:
    """An exception on one line, with the place it came from: `"KeyError: 'x' (models.py:12)"`."""
    text = " ".join(str(error).split())
    line = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}: {error.msg} ({Path(error.filename).name}:{error.lineno})"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<") and frame.filename != __file__]
    return f"{line} ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else line


# ------------------------------------------------------------------------------------------------ factories


def resolve(text: str, what: str = "factory") -> Any:
    """The object that `"package.module:name"` or `"path/to/file.py:name"` stands for; modules are also looked for in the current directory.

    Raises:
        UsageError: not written so, or no such module, file or name.
        ExportError: importing the module raises.
    """
    place, colon, name = text.rpartition(":")
    if not colon or not place or not name:
        raise UsageError(f"{text!r} does not name a {what}", f"write it as package.module:{what}, or path/to/file.py:{what}")
    module = _from_file(Path(place)) if place.endswith(".py") or os.sep in place else _from_name(place)
    thing: Any = module
    for part in name.split("."):
        if not hasattr(thing, part):
            held = getattr(thing, "__dict__", {})
            names = [key for key, value in held.items() if not key.startswith("_") and (callable(value) or isinstance(value, nn.Module))]
            near = get_close_matches(part, names, 3)
            own = [key for key in names if getattr(held[key], "__module__", None) == module.__name__]
            hint = f"did you mean {' or '.join(near)}?" if near else f"it has: {', '.join(own[:8])}" if own else "check the name"
            raise UsageError(f"{place} has no {name!r}", hint)
        thing = getattr(thing, part)
    return thing


def _from_name(name: str) -> ModuleType:
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)  # stays: a factory may import more when it is called
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise UsageError(
                f"there is no module {error.name!r} to import" + (f" (for {name})" if error.name != name else ""),
                "run from the folder that holds it, install it, or give path/to/file.py:factory",
            ) from error
        raise _import_failed(name, error) from error
    except (Exception, SystemExit) as error:
        raise _import_failed(name, error) from error


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file", "give the path of a Python file, as seen from the current directory")
    path = path.resolve()
    known = sys.modules.get(path.stem)
    if known is not None and getattr(known, "__file__", None) == str(path):
        return known
    folder = str(path.parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    name = path.stem if known is None else f"edgeadapt_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path}: not a Python file", "its name must end with .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _import_failed(path.name, error) from error
    return module


def _import_failed(name: str, error: BaseException) -> ExportError:
    if isinstance(error, ModuleNotFoundError) and error.name:
        return ExportError(
            f"importing {name} failed: {one_line(error)}", f"install {error.name.partition('.')[0]}, or run from the folder that holds it"
        )
    return ExportError(f"importing {name} failed: {one_line(error)}", "the module must be importable without side effects such as reading arguments")


def call(thing: Any, text: str, what: str = "factory") -> Any:
    """Call a factory without arguments.

    Raises:
        UsageError: it cannot be called so.
        ExportError: it raises.
    """
    if not callable(thing):
        raise UsageError(
            f"{text} is of type {type(thing).__name__}, not a {what}", f"name a function or class that takes no arguments and gives the {what}"
        )
    try:
        needed = [
            parameter.name
            for parameter in inspect.signature(thing).parameters.values()
            if parameter.default is parameter.empty and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ]
    except (TypeError, ValueError):  # no signature to look at
        needed = []
    if needed:
        raise UsageError(
            f"{text} needs arguments: {', '.join(needed)}",
            f"name a function that needs none, such as: def edge(): return {text.rpartition(':')[2]}({', '.join(f'{name}=…' for name in needed)})",
        )
    try:
        return thing()
    except (Exception, SystemExit) as error:
        raise ExportError(f"{text} raised {one_line(error)}", "call it by itself in Python to see the whole traceback") from error


def load_factory(text: str) -> nn.Module:
    """The module that a factory gives, in eval mode on the CPU.

    Args:
        text: `"package.module:factory"` or `"path/to/file.py:factory"`, where the factory is a function or class without required arguments that
            gives an nn.Module, or is such a module itself.

    Raises:
        UsageError: no such module or name, or the factory needs arguments.
        ExportError: the factory or its module raises, or gives something else.
    """
    thing = resolve(text)
    model = thing if isinstance(thing, nn.Module) else call(thing, text)
    if not isinstance(model, nn.Module):
        state = isinstance(model, Mapping) and any(isinstance(value, Tensor) for value in model.values())
        hint = "return the model itself and give its weights by --weights" if state else "return the nn.Module itself"
        raise ExportError(f"{text} gave an object of type {type(model).__name__}, expected a torch.nn.Module", hint)
    model = _unwrapped(model)
    absent = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if absent:
        raise ExportError(f"{text} gave a model on the meta device: {absent[0]} has no values", "build it on the CPU")
    return model.cpu().eval()


def _unwrapped(model: nn.Module) -> nn.Module:
    """Without torch.compile's and DataParallel's wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


# ------------------------------------------------------------------------------------------------ weights


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> str:
    """Fill `model` in place from a .safetensors, .pt, .pth, .bin or .ckpt file; floating-point tensors become float32, in the model too.

    A state dict inside `{"state_dict": …}` or `{"model": …}` is found, and a first name that all keys share and the model does not know ("module.")
    is dropped. `num_batches_tracked` may be missing on either side.

    Returns:
        SHA-256 (hex) of the model's tensors, as `weights_sha256`.

    Raises:
        InputError: the file is missing, damaged, of another kind, or would run code; keys are missing, unexpected or of another shape; a weight is
            NaN or infinite.
    """
    given = _floats(_without_prefix(_read(Path(path)), model), path)
    model.float()
    state = model.state_dict()
    odd = [name for name, tensor in given.items() if name in state and not _lazy(state[name]) and tensor.shape != state[name].shape]
    report = model.load_state_dict({name: tensor for name, tensor in given.items() if name not in odd}, strict=False)
    state = model.state_dict()
    tied = {state[name].data_ptr() for name in given if name in state and not _lazy(state[name]) and state[name].numel()}
    missing = [
        name
        for name in report.missing_keys
        if name not in odd and not name.endswith(COUNTER) and (_lazy(state[name]) or state[name].data_ptr() not in tied)
    ]
    unexpected = [name for name in report.unexpected_keys if not name.endswith(COUNTER)]
    if odd or missing or unexpected:
        raise _misfit(path, model, given, odd, missing, unexpected)
    return weights_sha256(model)


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 (hex) over name, type, shape and bytes of every tensor of the model's state, by name: the same whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor) and not name.endswith(COUNTER):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _lazy(tensor: Any) -> bool:
    return isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer))


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(
            f"{path}: {'is a folder' if path.is_dir() else 'there is no such file'}", "give a .safetensors or .pt file with the model's state dict"
        )
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise InputError(
                f"{path}: not a whole safetensors file: {' '.join(str(error).split())}",
                "copy it again, or save it again with safetensors.torch.save_file(model.state_dict(), path)",
            ) from error
    if path.suffix not in TORCH_FILES:
        raise InputError(
            f"{path}: weights are read from .safetensors, {', '.join(TORCH_FILES)} files, not {path.suffix or 'one without an ending'}",
            "in Python: safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')",
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises nearly anything
        raise _unreadable(path, error) from error
    return _state_dict(loaded, path)


def _unreadable(path: Path, error: Exception) -> InputError:
    text = " ".join(str(error).split())
    convert = "torch.save(model.state_dict(), 'weights.pt')"
    if "TorchScript" in text:
        return InputError(
            f"{path}: a TorchScript archive, which holds a program", f"where you trust it: model = torch.jit.load({path.name!r}); {convert}"
        )
    if "Weights only load failed" in text:
        found = re.search(r"GLOBAL ([\w.]+)", text)
        return InputError(
            f"{path}: holds more than tensors" + (f": loading it would run {found[1]}, which edgeadapt never does" if found else ""),
            f"where you trust it, load it with your own code and save the tensors alone: {convert}",
        )
    reason = f"{type(error).__name__}: {text.partition('. ')[0][:160]}" if text else type(error).__name__
    return InputError(f"{path}: cannot be read as a torch weights file ({reason})", f"copy it again, or save it again with {convert}")


def _state_dict(loaded: Any, path: Path) -> dict[str, Tensor]:
    for _ in range(3):
        if not isinstance(loaded, Mapping):
            break
        inner = next((loaded[name] for name in WRAPPERS if isinstance(loaded.get(name), Mapping)), None)
        if inner is None:
            break
        loaded = inner
    if not isinstance(loaded, Mapping):
        raise InputError(
            f"{path}: holds an object of type {type(loaded).__name__}, expected a state dict", "save it with torch.save(model.state_dict(), path)"
        )
    tensors = {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}
    if not tensors:
        keys = ", ".join(repr(key) for key in list(loaded)[:SHOWN]) or "nothing"
        raise InputError(
            f"{path}: holds no tensors, only {keys}", f"put the state dict itself, or one under {' or '.join(map(repr, WRAPPERS))}, into the file"
        )
    return tensors


def _without_prefix(given: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Drops first names that all keys share and the model does not know: module. (DataParallel), _orig_mod. (torch.compile), model. (Lightning)."""
    known = {name.partition(".")[0] for name in model.state_dict()}
    while given:
        first = {name.partition(".")[0] for name in given}
        if len(first) > 1 or first & known or not all("." in name for name in given):
            break
        given = {name.partition(".")[2]: tensor for name, tensor in given.items()}
    return given


def _floats(given: dict[str, Tensor], path: str | os.PathLike[str]) -> dict[str, Tensor]:
    table = {}
    for name, tensor in given.items():
        if tensor.is_floating_point():
            tensor = tensor.float()
            if not bool(torch.isfinite(tensor).all()):
                raise InputError(
                    f"{path}: {name} holds {int((~torch.isfinite(tensor)).sum())} values that are NaN or infinite",
                    "use a checkpoint from before the training diverged",
                )
        table[name] = tensor
    return table


def _misfit(
    path: str | os.PathLike[str], model: nn.Module, given: Mapping[str, Tensor], odd: Sequence[str], missing: Sequence[str], unexpected: Sequence[str]
) -> InputError:
    state = model.state_dict()
    parts = []
    if missing:
        parts.append(f"{len(missing)} of the model's {len(state)} tensors are missing ({_some(missing)})")
    if unexpected:
        parts.append(f"{len(unexpected)} in the file are unknown to the model ({_some(unexpected)})")
    if odd:
        shapes = [
            f"{name}: {format_shape(tuple(given[name].shape))} in the file, {format_shape(tuple(state[name].shape))} in the model" for name in odd
        ]
        parts.append(f"{len(odd)} have another shape ({_some(shapes, '; ')})")
    hint = "the factory must build the same architecture as the file, with the same number of classes"
    if missing and unexpected and len(unexpected) == len(given):
        hint = f"the file is of another architecture, or its names differ: {unexpected[0]!r} there, {missing[0]!r} here"
    return InputError(f"{path}: does not fit {type(model).__name__}: {', '.join(parts)}", hint)


def _some(names: Sequence[str], separator: str = ", ") -> str:
    return separator.join(names[:SHOWN]) + (separator + "…" if len(names) > SHOWN else "")
