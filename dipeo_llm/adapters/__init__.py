"""Adapters: one file a provider, and what they share."""
