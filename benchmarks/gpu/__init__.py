"""Checks and times the GPU path in one run; `python -m benchmarks.gpu`, or `gpu.sh` beside it."""
