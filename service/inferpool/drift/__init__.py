"""How far the inputs and outputs of requests are from those of a reference: profiles, counts, distances."""
