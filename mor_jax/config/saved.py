"""The configuration that a run directory holds."""

from __future__ import annotations

import json

from mor_jax.config.config import Config
from mor_jax.config.parse import from_dict
from mor_jax.errors import ConfigError
from mor_jax.paths import as_path, reason


def saved_config(run: str) -> Config:
    """config.json of a run directory, of this machine or an object store. Raises ConfigError: there
    is none."""
    path = as_path(run) / "config.json"
    try:
        return from_dict(json.loads(path.read_text()))
    except (OSError, ValueError) as e:
        raise ConfigError(
            f"{path} cannot be read: {reason(e) if isinstance(e, OSError) else e}. Give a run directory."
        ) from e
