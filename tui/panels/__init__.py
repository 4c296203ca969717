"""The panels, in the order of their number keys."""

from __future__ import annotations

from tui.panel import Panel
from tui.panels.breakers import BreakersPanel
from tui.panels.caches import CachesPanel
from tui.panels.overview import Overview
from tui.panels.pipeline import PipelinePanel
from tui.panels.signals import SignalsPanel

PANELS: tuple[type[Panel], ...] = (
    Overview,
    PipelinePanel,
    BreakersPanel,
    CachesPanel,
    SignalsPanel,
)
