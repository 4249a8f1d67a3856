"""Commands, one a file: `python -m launch.train --help`."""
