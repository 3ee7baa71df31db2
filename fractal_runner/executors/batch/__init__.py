"""Executors on clusters: one manager for all of them, and a file per scheduler."""
