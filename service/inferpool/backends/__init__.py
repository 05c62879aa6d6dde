"""Adapters to the runtimes, one folder each; nothing else imports onnxruntime or torch."""
