"""What runs inside the REPL's own process: standard library only, started by path, imports nothing
of the runtime."""
