"""Exports signals over OTLP or Alertmanager webhooks, and archives spans as Parquet."""
