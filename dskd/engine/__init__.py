"""All that knows DeepSpeed: configs, the engine, shards, hooks and checkpoints."""
