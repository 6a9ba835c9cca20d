"""What travels over the wire, to the letter: requests with their ranges, replies with their fields.

Knows shapes and ranges, and nothing of a model.
"""
