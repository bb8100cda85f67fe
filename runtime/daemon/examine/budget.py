"""Whether the bundle fits what the process may hold, by the plan, with all that the daemon holds beside the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeadapt.errors import EdgeAdaptError
from edgeadapt.runtime.daemon.examine.terms import Findings, Found, Site
from edgeadapt.units import format_bytes

if TYPE_CHECKING:
    from edgeadapt.bundle import Bundle
    from edgeadapt.memory.simulation import Simulation

SUBJECT = "budget"
_FIX = "edgeadapt simulate {path} --board here --budget SIZE says what would fit; give a larger memory.budget, or another bundle"


def look(site: Site, bundle: Bundle, runs: bool) -> Findings:
    """By the same figures as `edgeadapt simulate` has.

    Args:
        site: see there.
        bundle: the one that is served.
        runs: a daemon does already, so that what is free now is not what it may have.
    """
    from edgeadapt.runtime.daemon.model import beside

    config, budget = site.config, site.config.memory.budget
    adapts = config.adapt.enabled and bool(bundle.manifest.planned("adapt")) and not (config.adapt.guard and bundle.manifest.reference is None)
    try:
        plans = _plans(site, bundle, adapts)
        if not plans:
            return  # what is wrong with adapt.window is told with the configuration
        fitting = next((plan for plan in plans if plan.fits is not False), None)
        if fitting is None and adapts:
            nearest = min(plans, key=lambda plan: plan.ledger.total)
            only = next((plan for plan in _plans(site, bundle, False) if plan.fits), None)
            yield _does_not_fit(site, bundle, nearest, only)
            return
    except EdgeAdaptError as reason:
        yield Found(SUBJECT, "warning", f"what it takes cannot be said: {reason.message}", reason.hint)
        return
    if fitting is None:
        yield _does_not_fit(site, bundle, plans[0], None)
        return
    what = fitting.choice.words
    more = beside(config, bundle.manifest, adapts)
    takes = f"{what} takes {format_bytes(fitting.ledger.total)} by the plan, {format_bytes(more)} of it beside the model"
    machine = site.report.machine
    free = machine.usable if site.who is not None and site.who.ours else machine.memory_available  # a unit is in no group of ours
    if budget is None:
        if fitting.ledger.total > machine.memory_total > 0:
            text = f"no memory.budget; {takes}, and this machine has {format_bytes(machine.memory_total)}"
            yield Found(SUBJECT, "fault", text, _FIX.format(path=bundle.path))
        elif not runs and fitting.ledger.total > free > 0:
            text = f"no memory.budget; {takes}, and {format_bytes(free)} are usable now"
            yield Found(SUBJECT, "warning", text, "end other programs, or give a memory.budget")
        else:
            yield Found(SUBJECT, "fine", f"no memory.budget, so that nothing bounds it; {takes}")
        return
    if not runs and budget > free > 0:
        text = f"{takes}; the budget of {format_bytes(budget)} is more than the {format_bytes(free)} that are usable now"
        yield Found(SUBJECT, "warning", text, "end other programs, or give a smaller memory.budget")
    else:
        yield Found(SUBJECT, "fine", f"{takes}, of {format_bytes(budget)}")


def _plans(site: Site, bundle: Bundle, adapts: bool) -> list[Simulation]:
    """In the order in which the daemon would take them; all that it may choose of."""
    from edgeadapt.memory.simulation import simulate
    from edgeadapt.runtime.daemon.model import beside

    config, manifest = site.config, bundle.manifest
    sizes = [1]
    if adapts:
        asked, found = config.adapt.window, None if manifest.searched is None else manifest.searched.window
        sizes = [size for size in manifest.planned("adapt") if (size == asked if asked else size <= (found or size))]
    role, answering = ("adapt" if adapts else "predict"), adapts and config.predict.cap is not None
    slack = beside(site.config, bundle.manifest, adapts)
    asked_of = (config.memory.budget, config.predict.threads)
    return [simulate(bundle, site.report.board, role, size, *asked_of, slack=slack, answering=answering) for size in sizes]


def _does_not_fit(site: Site, bundle: Bundle, nearest: Simulation, only: Simulation | None) -> Found:
    from edgeadapt.runtime.daemon.model import beside

    budget = site.config.memory.budget or 0
    more = format_bytes(beside(site.config, bundle.manifest, only is not None))
    text = f"{nearest.choice.words} takes {format_bytes(nearest.ledger.total)} by the plan, {more} of it beside the model: "
    text += f"{format_bytes(nearest.ledger.total - budget)} more than memory.budget ({format_bytes(budget)})"
    fix = _FIX.format(path=bundle.path)
    if only is not None:
        return Found(SUBJECT, "fault", f"{text}; the daemon would only predict, as it was exported", fix)
    return Found(SUBJECT, "fault", f"{text}; not even predicting fits, so that no frame is answered", fix)
