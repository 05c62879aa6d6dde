"""The API of KServe and TensorFlow Serving: `/v1/models/{model}:predict`."""
