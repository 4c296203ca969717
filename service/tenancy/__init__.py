"""Tenants: the directory, authentication, quotas, and what the ledger has of deleted ones."""
