"""What the presets of the family share: the sizes, the text and the recipe of
configs/quickstart.py, so that any two compare at equal width, data and training FLOPs. Override
`model`, `data` and `train` for another scale.
"""

from ml_collections import ConfigDict

from configs import quickstart


def preset(
    name: str,
    layers: tuple[int, int, int],
    recursions: int,
    model: dict | None = None,
    recursion: dict | None = None,
) -> ConfigDict:
    """`layers`: blocks of prelude, core and coda, each of its own."""
    prelude, core, coda = layers
    config = quickstart.get_config("recursive")
    config.name = name
    config.model.update(
        {
            "sharing": "cycle",
            "prelude": prelude,
            "coda": coda,
            "recursions": recursions,
            "layers": prelude + core * recursions + coda,
            **(model or {}),
        }
    )
    config.recursion.update(recursion or {})
    return config
