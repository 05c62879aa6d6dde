"""Tests of `inferpool.explain`."""
