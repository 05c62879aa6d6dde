"""The models folder: its layout, its settings, and the versions that are served from it."""
