"""The model itself: where its tensors come from, its layers, their caches, and the drawing of tokens.

Knows torch and transformers, and no network but the model hub's.
"""
