"""Offline training: text to token shards, token shards to a checkpoint."""
