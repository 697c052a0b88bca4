"""Text to token shards, and token shards to batches, in an order that is a pure function of the config."""
