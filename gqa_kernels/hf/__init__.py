"""HuggingFace: patch() and unpatch()."""
