"""Executors on this machine: one dispatcher, four kinds of worker, and one without either."""
