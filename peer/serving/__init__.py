"""What a peer does for sessions: reserve memory, compute steps, pass them on."""
