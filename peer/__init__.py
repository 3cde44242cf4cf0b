"""A machine that lends layers: it loads a span, announces it to relays, and computes it for sessions."""
