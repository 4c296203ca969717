"""The panels, in the order of their number keys; the tenth has the key 0."""

from __future__ import annotations

from betrace.tui.panels.breakers import BreakersPanel
from betrace.tui.panels.caches import CachesPanel
from betrace.tui.panels.cluster import ClusterPanel
from betrace.tui.panels.dead_letters import DeadLettersPanel
from betrace.tui.panels.overview import OverviewPanel
from betrace.tui.panels.pipeline import PipelinePanel
from betrace.tui.panels.rules import RulesPanel
from betrace.tui.panels.signals import SignalsPanel
from betrace.tui.panels.system import SystemPanel
from betrace.tui.panels.tenants import TenantsPanel
from betrace.tui.widgets.panel import Panel

PANELS: tuple[type[Panel], ...] = (
    OverviewPanel,
    PipelinePanel,
    BreakersPanel,
    CachesPanel,
    SignalsPanel,
    RulesPanel,
    DeadLettersPanel,
    TenantsPanel,
    SystemPanel,
)

OF_CLUSTERS: tuple[type[Panel], ...] = (ClusterPanel,)
"""Panels after these, if the service is part of a cluster."""
