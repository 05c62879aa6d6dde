"""Models in stores: object stores, web servers, registries and model hubs, fetched into a local folder."""
