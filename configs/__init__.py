"""Run configurations: each file has `get_config(arg)` and nothing but data."""
