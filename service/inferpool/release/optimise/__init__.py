"""Smaller and faster forms of an ONNX model: how they are made, timed, and judged by a goal."""
