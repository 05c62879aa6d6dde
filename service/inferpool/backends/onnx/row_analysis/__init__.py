"""Batch-axis analysis of ONNX graphs: whether any operation mixes the rows of a batch.

Every value of the graph is given the axis along which its rows lie. Each operation carries that axis from its
inputs to its outputs by a rule of its own, as the batching rules of JAX's `vmap` do.
"""
