"""Panels of the rules: which of them break, and how often."""

from __future__ import annotations

from grafana.panel import RATE, Panel, Query

_RAISED = 'betrace_rule_signals_total{$on, kind="raised", muted="false"}'
_RETRACTED = 'betrace_rule_signals_total{$on, kind="retracted", muted="false"}'
_NOT_APPLICABLE = 'betrace_rule_evaluations_total{$on, outcome="not_applicable"}'
_APPLICABLE = 'betrace_rule_evaluations_total{$on, outcome!="not_applicable"}'
_SIGNALS = (
    "Signals of this rule",
    "${pages}/signals?rule=${__field.labels.rule}&tenant=${__field.labels.tenant}",
)
_NAME = "{{tenant}} {{rule}}"

RULES = (
    Panel(
        "Rules broken in the last hour",
        "Rules that at least one trace broke in the last hour, without muted signals.",
        "short",
        (
            Query(
                f"count(sum by (tenant, rule) (increase({_RAISED}[1h])) > 0) or vector(0)",
                "rules",
            ),
        ),
        kind="stat",
        width=4,
    ),
    Panel(
        "Top breaking rules",
        "Signals a second of the ten rules that break most. BetraceRuleBroken fires while a rule "
        "breaks. With exemplars, the points name traces.",
        "cps",
        (Query(f"topk(10, sum by (tenant, rule) (rate({_RAISED}{RATE})))", _NAME),),
        width=10,
        link=_SIGNALS,
    ),
    Panel(
        "Compared with the day before",
        "Signals of the last hour as a multiple of the hourly average of the day before. "
        "BetraceRuleBrokenMore fires above 3.",
        "short",
        (
            Query(
                f"sum by (tenant, rule) (increase({_RAISED}[1h])) "
                f"/ (sum by (tenant, rule) (increase({_RAISED}[1d] offset 1h)) / 24 > 0)",
                _NAME,
            ),
        ),
        ((3, "red"),),
        width=10,
        link=_SIGNALS,
    ),
    Panel(
        "Alerts firing",
        "Rules that page somebody now, through [alerts].",
        "short",
        (Query("sum(betrace_alerts_firing{$on})", "alerts"),),
        width=6,
    ),
    Panel(
        "Alerts not delivered",
        "For how long a destination has not been told of an alert that began or ended. "
        "BetraceAlertsUndelivered fires above 2 min.",
        "s",
        (
            Query(
                "max by (destination) (betrace_alert_delivery_lag_seconds{$on})", "{{destination}}"
            ),
        ),
        ((120, "red"),),
        width=6,
    ),
    Panel(
        "Rules that do not apply",
        "Rules whose `when` held for none of the traces evaluated in the last hour. "
        "BetraceRuleNotApplicable fires after six hours.",
        "short",
        (
            Query(
                f"count(sum by (tenant, rule) (increase({_NOT_APPLICABLE}[1h])) > 0 "
                f"unless sum by (tenant, rule) (increase({_APPLICABLE}[1h])) > 0) or vector(0)",
                "rules",
            ),
        ),
        width=6,
    ),
    Panel(
        "Verdicts, by outcome",
        "Closed traces a second by what rules said of them.",
        "cps",
        (
            Query(
                f"sum by (outcome) (rate(betrace_rule_evaluations_total{{$on}}{RATE}))",
                "{{outcome}}",
            ),
        ),
        width=6,
    ),
    Panel(
        "Retracted signals, by rule",
        "Signals a second that late spans disproved. If there are many, traces.idle_seconds is too "
        "short for these traces.",
        "cps",
        (Query(f"topk(10, sum by (tenant, rule) (rate({_RETRACTED}{RATE})))", _NAME),),
        width=24,
    ),
)
