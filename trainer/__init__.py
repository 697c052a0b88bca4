"""From a Hydra config to a trained, resumable run folder."""
