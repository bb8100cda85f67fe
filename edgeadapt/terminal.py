"""Bars, sparklines and small pictures made of characters, and a part of the terminal that is drawn again in place.

Everything but `Screen` is a function from values to text.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

import numpy as np
from numpy.typing import NDArray

_CODES = {"without": "38;5;208", "with": "38;5;75", "soft": "38;5;245", "strong": "1"}


@dataclass(frozen=True)
class Style:
    """What a terminal can show.

    Attributes:
        colour: ANSI colours.
        blocks: the block characters of Unicode; otherwise ASCII.
        deep: 24-bit colours; otherwise the 256 of xterm.
    """

    colour: bool = False
    blocks: bool = True
    deep: bool = False

    def paint(self, text: str, kind: str) -> str:
        """The text in the colour of that kind: without, with, soft, strong."""
        return f"\x1b[{_CODES[kind]}m{text}\x1b[0m" if self.colour and text else text

    def bar(self, share: float, width: int, kind: str) -> str:
        """A bar of `width` columns, filled from the left by a share from 0 to 1."""
        share = min(max(share, 0.0), 1.0)
        if not self.blocks:
            full = round(share * width)
            return self.paint("#" * full, kind) + self.paint("." * (width - full), "soft")
        eighths = round(share * width * 8)
        text = "█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8]
        return self.paint(text, kind) + self.paint("·" * (width - len(text)), "soft")

    def spark(self, values: Sequence[float], width: int, kind: str) -> str:
        """The last `width` values, from 0 to 1, as a line of small columns."""
        steps = "▁▂▃▄▅▆▇█" if self.blocks else "_.-~=+*#"
        text = "".join(steps[round(min(max(value, 0.0), 1.0) * 7)] for value in values[-width:])
        return self.paint(text, kind) + " " * (width - len(text))

    def dots(self, level: int, of: int) -> str:
        """A level as filled and empty dots."""
        full, empty = ("●", "○") if self.blocks else ("*", ".")
        return full * level + empty * (of - level)

    def picture(self, image: NDArray[np.uint8], columns: int) -> list[str]:
        """An image [H,W,3] as lines of that many columns; a line is two rows of pixels."""
        rows = max(1, round(columns * image.shape[0] / image.shape[1] / 2))
        small = image[_centres(image.shape[0], 2 * rows)][:, _centres(image.shape[1], columns)]
        if not (self.colour and self.blocks):
            shades = " ░▒▓█" if self.blocks else " .:-=+*#%@"
            grey = small.mean(2).reshape(rows, 2, columns).mean(1)
            return ["".join(shades[min(int(value / 256 * len(shades)), len(shades) - 1)] for value in line) for line in grey]
        pairs = zip(small[::2].tolist(), small[1::2].tolist())
        return ["".join(f"\x1b[38;{self._shade(a)};48;{self._shade(b)}m▀" for a, b in zip(upper, lower)) + "\x1b[0m" for upper, lower in pairs]

    def _shade(self, pixel: Sequence[int]) -> str:
        if self.deep:
            return "2;" + ";".join(map(str, pixel))
        if max(pixel) - min(pixel) < 16:
            return f"5;{232 + min(sum(pixel) * 24 // 768, 23)}"
        red, green, blue = (min(value * 6 // 256, 5) for value in pixel)
        return f"5;{16 + 36 * red + 6 * green + blue}"


def _centres(size: int, count: int) -> NDArray[np.intp]:
    return ((np.arange(count) + 0.5) * size / count).astype(np.intp)


def beside(left: Sequence[str], width: int, right: Sequence[str]) -> list[str]:
    """Two columns of lines; those on the left are all `width` wide."""
    count = max(len(left), len(right))
    return [f"{left[i] if i < len(left) else ' ' * width}  {right[i] if i < len(right) else ''}".rstrip() for i in range(count)]


def style_of(stream: TextIO, colour: bool = True, environment: Mapping[str, str] | None = None) -> Style:
    """What a stream's terminal can show, by its encoding and the usual variables (NO_COLOR, TERM, COLORTERM)."""
    values = os.environ if environment is None else environment
    wanted = colour and stream.isatty() and not values.get("NO_COLOR") and values.get("TERM", "dumb") != "dumb"
    blocks = "utf" in (getattr(stream, "encoding", None) or "").lower()
    return Style(wanted, blocks, values.get("COLORTERM", "") in ("truecolor", "24bit"))


def is_live(stream: TextIO, columns: int, rows: int, environment: Mapping[str, str] | None = None) -> bool:
    """Whether a part of that size can be drawn again in place."""
    values = os.environ if environment is None else environment
    if not stream.isatty() or values.get("TERM", "dumb") == "dumb":
        return False
    size = shutil.get_terminal_size()
    return size.columns >= columns and size.lines > rows


class Screen:
    """Lines at the terminal's bottom that are drawn over themselves.

    Args:
        stream: a terminal.
        seconds: the least time between two drawings; those in between are left out.
    """

    def __init__(self, stream: TextIO, seconds: float = 0.1) -> None:
        self._stream, self._seconds = stream, seconds
        self._drawn, self._last = 0, float("-inf")

    def due(self) -> bool:
        """Whether a drawing would be shown now."""
        return time.monotonic() - self._last >= self._seconds

    def draw(self, lines: Sequence[str]) -> None:
        """Shows the lines in place of those shown before."""
        self._last = time.monotonic()
        head = f"\x1b[{self._drawn}F" if self._drawn else "\x1b[?25l"
        gone = "\x1b[0J" if self._drawn > len(lines) else ""
        self._stream.write(head + gone + "".join(f"{line}\x1b[K\n" for line in lines))
        self._stream.flush()
        self._drawn = len(lines)

    def close(self) -> None:
        """Shows the cursor again and leaves what is drawn where it is."""
        if self._drawn:
            self._stream.write("\x1b[?25h")
            self._stream.flush()
        self._drawn = 0

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
