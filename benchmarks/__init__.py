"""Benchmarks of fractal_runner: `python -m benchmarks` at the top directory runs them all.

Each module holds one benchmark: a function `run(report, scratch)`. Every figure stands beside that of a
yardstick measured in the same run, in turns: on a shared machine only the ratio means something.
"""
