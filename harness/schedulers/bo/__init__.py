"""Models behind the model-based schedulers, and what they share: encoding, candidates, reproducible arithmetic."""
