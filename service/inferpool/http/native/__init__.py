"""The native API, `/predict`: its paths, bodies, schemas and OpenAPI."""
