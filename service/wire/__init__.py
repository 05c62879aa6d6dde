"""Bytes to tensors and back: JSON, the Open Inference Protocol's binary form, and numpy's files."""
