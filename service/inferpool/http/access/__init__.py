"""Who may ask for what: keys, tokens, scopes, TLS, origins of web pages, tenants."""
