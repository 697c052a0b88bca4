"""The configuration tree: YAML composed by Hydra, shipped as package data."""
