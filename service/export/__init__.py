"""Signals sent to other systems: collectors by OTLP, and whatever takes Alertmanager's webhooks."""
