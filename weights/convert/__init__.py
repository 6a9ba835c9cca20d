"""Checkpoints of other programs, turned into our layout without running anything they carry."""
