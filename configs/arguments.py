"""What config files share: defaults, and the argument string: `configs/mor.py:360m,nr=3` calls
`get_config("360m,nr=3")`."""

from ml_collections import ConfigDict

from mor_jax.config import Config, depth_defaults, saved_config, unshared_ends
from mor_jax.errors import ConfigError


def complete(fields: dict) -> ConfigDict:
    """These fields, and the default of every other, of every depth policy, so that the command line
    can override any of them."""
    config = ConfigDict(Config().to_dict() | {"depth": depth_defaults()})
    config.update(fields)
    return config


def parse(arg: str | None, **defaults: str | int) -> dict:
    """`"360m,nr=3"` -> {"size": "360m", "nr": 3}: one bare word for the first default, `key=value`
    for the others.

    Raises ConfigError naming the piece that is not understood and what would be.
    """
    values = dict(defaults)
    first = next(iter(defaults))
    for piece in filter(None, (arg or "").split(",")):
        key, eq, value = piece.partition("=")
        if not eq:
            key, value = first, piece
        if key not in defaults:
            valid = ", ".join(f"{k}={v}" for k, v in defaults.items())
            raise ConfigError(
                f"config argument {piece!r} is not understood; valid, with their defaults: {valid}."
            )
        try:
            values[key] = type(defaults[key])(value)
        except ValueError as e:
            raise ConfigError(f"config argument {piece!r}: {key} must be a whole number.") from e
    return values


def source(run: str) -> tuple[dict, int, int]:
    """(configuration, layers before and after the recursion, blocks of its core) of the run
    directory of a source.

    Raises ConfigError: it has no configuration.
    """
    config = saved_config(run)
    ends = sum(unshared_ends(config.model))
    return config.to_dict(), ends, (config.model.layers - ends) // config.model.recursions
