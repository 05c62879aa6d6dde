"""Batch-axis analysis of PyTorch's graphs: whether any operation mixes the rows of a batch.

The rules are those of `inferpool.backends.row_analysis`; this folder reads exported programs and TorchScript,
and puts each operation of ATen into the vocabulary of the rules. No module but `script` needs PyTorch.
"""
