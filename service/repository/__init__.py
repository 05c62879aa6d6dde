"""The models folder: what is in it, how each model wants to be served, and the versions that are loaded."""
