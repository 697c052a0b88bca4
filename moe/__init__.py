"""Qwen3 dense and mixture-of-experts models: arithmetic on one rank, in plain torch."""
