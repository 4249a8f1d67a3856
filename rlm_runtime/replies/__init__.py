"""What models and cells wrote, before it is taken for anything: its JSON, its thinking, and the
thread that reads it.

The ground that `lms`, `parsing`, `structured` and `rlm` stand on together: one reader of each kind,
each with a bound.
"""
