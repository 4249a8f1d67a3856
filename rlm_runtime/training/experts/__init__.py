"""Expert programs, a file for a family of tasks: each has an `EXPERT`."""
