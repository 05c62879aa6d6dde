"""ONNX models on a GPU. Experimental: the CPU server works without this folder."""
