"""Fractal's workflow semantics. It knows an executor only as `concurrent.futures.Executor`."""
