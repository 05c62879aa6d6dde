"""The command `inferpool profile`: the reference that a version's requests are compared with."""
