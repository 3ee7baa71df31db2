"""Executors over existing engines; each needs its extra."""
