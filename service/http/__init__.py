"""Everything that knows HTTP: the predict lane, the other routes, and errors as statuses."""
