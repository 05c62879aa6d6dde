"""Explanations over HTTP: their routes, and how their passes get to the pool and back."""
