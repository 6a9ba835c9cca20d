"""The network and its alphabet; knows nothing of serving."""
