"""A laboratory: NAT models, an in-memory internet, namespaces with real delay."""
