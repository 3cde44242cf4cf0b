"""The asker's side of the swarm: who is there, which route to take, and one session's life."""
