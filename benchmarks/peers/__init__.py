"""Inferpool measured beside other servers of models: `scripts/bench peers`, see `__main__.py`."""
