"""Explains an answer of a model by forward passes: the policy, which knows no pool and no HTTP."""
