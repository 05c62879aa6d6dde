"""What is kept of requests, and how little of it: rules for fields, keys, noise, and the encrypted store."""
