"""The demo model: a tiny Llama that ships with Corolla, the text it learned, and its training script."""
