"""What is learned: files to conversations to token ids to packed steps. CPU only, knows no model."""
