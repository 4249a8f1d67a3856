"""Sweeps for `launch.sweep`: each file has `get_sweep(arg)` and nothing but data."""
