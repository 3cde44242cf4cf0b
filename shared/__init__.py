"""What at least two rooms use: words, messages, identities, channels and the client. Knows no room."""
