"""The Open Inference Protocol, `/v2`: its paths, bodies, schemas and OpenAPI."""
