"""Tenants as the service keeps them: who they are, how they prove it, and how they go."""
