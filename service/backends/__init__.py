"""Adapters to the runtimes that execute models."""
