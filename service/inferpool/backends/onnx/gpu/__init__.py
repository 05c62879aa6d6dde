"""ONNX models on a GPU. The CPU server works without this folder."""
