"""Tests of explanations over HTTP."""
