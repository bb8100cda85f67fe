"""What a source of frames is. A source opens nothing that blocks before it is iterated, and one broken frame does not end it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

from edgeadapt.bundle import InputSpec, Task
from edgeadapt.errors import InputError

PIXELS = 2**25
"""Larger pictures are refused frame by frame: one of this size takes 96 MiB as an array, and while it is decoded up to 450."""


class PictureTooLarge(InputError):
    """A picture has more pixels, or would take more memory while it is read, than may be."""


@dataclass(frozen=True, eq=False)
class Frame:
    """One frame, or the reason why there is none.

    Attributes:
        id: the file's name, or the frame's number in its stream.
        pixels: uint8 [H,W,C] or [H,W], or float32 [*input.shape]; None where `fault` says why.
        truth: the class if the source knows it, for segmentation one a pixel [H,W]. Not checked against the bundle.
        fault: why there are no pixels, in words.
    """

    id: str | int
    pixels: NDArray[Any] | None
    truth: int | NDArray[Any] | None = None
    fault: str = ""

    @property
    def nbytes(self) -> int:
        """Of its pixels; 0 without."""
        return 0 if self.pixels is None else self.pixels.nbytes


class Source(ABC):
    """Frames in their order, once.

    Attributes:
        name: how a person would call it.
        count: how many frames there will be; None where that is not known.
        labelled: whether frames come with their truth; of a stream that cannot be known before its end.
        live: whether frames come when they come, from a device or a wire, and are lost where nobody takes them.
        keeps: whether those of a live one are not lost, but stay where they are until they are taken, as files do.
        deletes: whether what held a frame is deleted once the next one is asked for. It is asked for that when it is wanted, and no sooner.
        right: the kinds of `counts` that say that something came which could be used, though it need not be a whole frame.
        wrong: the kinds of `counts` that say that something came which could not be used.
        advice: what to look at where nothing else comes; "" where that is not known.
    """

    name: str
    count: int | None = None
    labelled: bool | None = None
    live = False
    keeps = False
    deletes = False
    right: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    advice = ""

    @property
    def counts(self) -> Mapping[str, int]:
        """How often what happened beside frames, such as "crc" for checksums that differ; may be read from any thread."""
        return {}

    @abstractmethod
    def __iter__(self) -> Iterator[Frame]:
        """The frames.

        Raises:
            SourceError: the source broke off; the frames before that have been given.
        """

    def stop(self) -> None:  # noqa: B027
        """Has a live source end its iteration within half a second, whatever it waits for; from any thread, for good. Files end by themselves."""

    def spare(self) -> None:  # noqa: B027
        """What held the last frame is not to be deleted: it could not be answered. From any thread, while the next one is not asked for."""

    def close(self) -> None:  # noqa: B027
        """Lets go of files and devices. A second close does nothing."""

    def __enter__(self) -> Source:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


@dataclass(frozen=True)
class Wanted:
    """What a bundle takes; a source reads no further than that asks.

    Attributes:
        picture: the most bytes that reading one picture may take, all threads together. One that would take more is a frame with a fault, and others
            come in the input's own size, as `preprocess.fitted` makes them. None: they come as they are, up to `PIXELS`.
    """

    input: InputSpec
    task: Task
    picture: int | None = None

    def label(self, value: object) -> int | None:
        """A class by number or name; None where it is neither."""
        if isinstance(value, str):
            return self.task.names.index(value) if self.task.names is not None and value in self.task.names else None
        return value if type(value) is int and 0 <= value < self.task.classes else None
