"""From text to token shards, and from shards to batches in an order that is a pure function of the config."""
