"""How the demo looks in a terminal: a picture and gauges drawn in place, or one line a stage, and a table at the end. Pure functions."""

from __future__ import annotations

from edgeadapt.demo.loop import CLEAN, STAGES, Step, Tally, words
from edgeadapt.terminal import Style, beside
from edgeadapt.units import format_bytes

COLUMNS, ROWS = 78, 16
_PICTURE, _BAR, _LABEL = 24, 22, 9


def live(step: Step, tally: Tally, style: Style, title: str) -> list[str]:
    """The view after a step: `ROWS` lines of at most `COLUMNS` columns."""
    window = step.window
    total, now = tally.all.errors(), tally.now()
    strength = "as in training" if window.name == CLEAN else f"{style.dots(window.severity, 5)}  severity {window.severity} of 5"
    read = [style.paint(f"{label}, {'right' if label == step.truth else 'wrong'}", kind) for label, kind in zip(step.labels, ("without", "with"))]
    lines = [
        f"{style.paint(words(window.name), 'strong')}{' ' * max(1, 18 - len(window.name))}{strength}",
        f"this is a {step.truth}; without: {read[0]}; adapting: {read[1]}",
        "",
        style.paint("read wrong", "soft"),
    ]
    for which, (name, kind) in enumerate((("without", "without"), ("adapting", "with"))):
        gauge = style.bar(total[which] / 100, _BAR, kind)
        lines.append(f"{name:<{_LABEL}}{gauge} {total[which]:5.1f} %  now {now[which]:5.1f} %")
        lines += [" " * _LABEL + style.spark([pair[which] for pair in tally.recent], 40, kind), *([""] if which == 0 else [])]
    held = style.bar(step.resident / tally.budget, _BAR, "soft")
    lines += [
        "",
        f"{'memory':<{_LABEL}}{held} {format_bytes(step.resident)} of {format_bytes(tally.budget)}",
        f"{'time':<{_LABEL}}{step.milliseconds[1]:.2f} ms a frame adapting, {step.milliseconds[0]:.2f} ms without",
        f"{'frame':<{_LABEL}}{style.bar(tally.all.frames / tally.planned, _BAR, 'soft')} {tally.all.frames:,} of {tally.planned:,}",
    ]
    return [style.paint(title, "soft"), "", *beside(style.picture(step.image, _PICTURE), _PICTURE, lines)]


def stage_line(position: int, tally: Tally) -> str:
    """A finished stage in one line, for output that is no terminal."""
    count = tally.stages[position]
    without, adapting = count.errors()
    held = format_bytes(tally.memory.points[-1][1] * 2**20)
    where = f"{position + 1}/{len(STAGES)} {words(STAGES[position]):<16}{count.frames:>6} frames"
    return f"{where}   wrong without {without:5.1f} %   adapting {adapting:5.1f} %   {held:>8}"


def table(tally: Tally, style: Style) -> list[str]:
    """The finding: percent wrong a stage, both ways."""
    lines = [style.paint(f"{'':<18}{'frames':>8}{'without':>12}{'adapting':>12}", "soft")]
    rows = [(words(name), count) for name, count in zip(STAGES, tally.stages) if count.frames]
    for name, count in [*rows, ("all", tally.all)]:
        without, adapting = count.errors()
        text = f"{name:<18}{count.frames:>8,}" + style.paint(f"{without:>10.1f} %", "without") + style.paint(f"{adapting:>10.1f} %", "with")
        lines.append(style.paint(text, "strong") if name == "all" and not style.colour else text)
    frozen_time, adapting_time = tally.milliseconds
    lines += [
        "",
        f"memory    {format_bytes(tally.resident)} resident at most, of a budget of {format_bytes(tally.budget)}",
        f"time      {adapting_time.at(0.5):.2f} ms a frame adapting (95 % under {adapting_time.at(0.95):.2f}), {frozen_time.at(0.5):.2f} ms without",
    ]
    return lines
