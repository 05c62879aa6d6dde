"""Scripts that turn a trained model into ONNX, each with the packages of its framework.

Each is run by itself: SCRIPT SOURCE EXAMPLE OUT. SOURCE is the trained model, EXAMPLE an `.npz` file with the
inputs of some rows by name. A script writes `model.onnx` and `imported.npz`, the framework's own outputs for
these rows by name, and `imported.json`: versions, the kind of model, and the names of classes, if any.
"""
