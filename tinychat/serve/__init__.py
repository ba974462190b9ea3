"""The HTTP server: what listens, who may ask, the answers of several clients at once, and each API's form."""
