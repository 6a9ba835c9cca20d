"""HTTP in front of the engine: validation, text, streams, metrics."""
