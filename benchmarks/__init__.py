"""Measurements: the engine alone, servers over HTTP; every number in the docs comes from here."""
