"""Adapters of the fake library, found the way real ones are."""
