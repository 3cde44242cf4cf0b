"""The gateway: the page, the OpenAI-compatible API, and the way from HTTP to the swarm. Knows no torch."""
