"""The command line: every command builds configs and calls a room."""
