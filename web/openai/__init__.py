"""The OpenAI-compatible API: the same words and errors that existing clients already understand."""
