"""What is on disk: names to folders, hub layout, adapters, training state, GGUF."""
