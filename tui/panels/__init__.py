"""The panels, in the order of their number keys."""

from __future__ import annotations

from tui.panel import Panel
from tui.panels.breakers import BreakersPanel
from tui.panels.caches import CachesPanel
from tui.panels.deadletters import DeadLettersPanel
from tui.panels.overview import Overview
from tui.panels.pipeline import PipelinePanel
from tui.panels.rules import RulesPanel
from tui.panels.signals import SignalsPanel
from tui.panels.system import SystemPanel
from tui.panels.tenants import TenantsPanel

PANELS: tuple[type[Panel], ...] = (
    Overview,
    PipelinePanel,
    BreakersPanel,
    CachesPanel,
    SignalsPanel,
    RulesPanel,
    DeadLettersPanel,
    TenantsPanel,
    SystemPanel,
)
