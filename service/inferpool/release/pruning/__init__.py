"""Structured pruning, as a script for a process of its own: it runs PyTorch and a model's `build.py`."""
