"""Checkpoints in the Hugging Face GPT-2 layout, safetensors only."""
