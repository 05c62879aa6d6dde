"""CUDA's runtime library through ctypes. Imported by folders named `gpu` only."""
