"""The command `inferpool predict`."""
