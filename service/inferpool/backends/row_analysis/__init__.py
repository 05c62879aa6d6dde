"""The common part of reading ONNX and PyTorch graphs for mixed rows.

Every value has the axis along which its rows lie. The rules say how operations carry that axis from inputs to
outputs. They are written in the vocabulary of ONNX; the graphs of PyTorch are put into it by
`inferpool.backends.torch.row_analysis`.
"""
