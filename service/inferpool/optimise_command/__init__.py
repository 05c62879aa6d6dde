"""The command `inferpool optimise`: faster forms of a model, of which one is kept if it is good enough."""
