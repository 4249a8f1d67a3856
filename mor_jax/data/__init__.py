"""Text in, batches out: corpus -> tokenizer -> packed rows -> batches on the mesh.

    from mor_jax.data.loader import Loader, eval_batches
    from mor_jax.data.prepare import prepare
    from mor_jax.data.tokenizer import load_tokenizer

    data = prepare(cfg.data, cfg.model.context)          # written once, then only read
    loader = Loader(data.train, cfg.train.batch_size, seed=cfg.data.seed, sharding=batch_sharding)
    batch = loader.at(step)                              # {"tokens": [B, T], "segment_ids": [B, T]}

Nothing is imported here, so that a process that only decodes text pays neither for TFDS nor for
grain.
"""
