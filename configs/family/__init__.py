"""Published looped architectures, each a setting of the same core (docs/family.md)."""
