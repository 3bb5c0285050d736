"""What is computed: the decoder and its parts. Imports torch and nothing of the package."""
