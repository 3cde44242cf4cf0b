"""The meeting point: who serves which layers, and how to reach them. Sees no prompts, weights or tensors."""
