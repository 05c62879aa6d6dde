"""Who may ask for what: keys, scopes, TLS, origins of web pages, tenants."""
