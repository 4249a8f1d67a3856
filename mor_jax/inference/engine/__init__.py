"""The inference engine: many sequences at once, each token as deep as it needs."""
