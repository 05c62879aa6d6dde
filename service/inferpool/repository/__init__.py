"""The models folder, and what is served of it."""
