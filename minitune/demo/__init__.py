"""The embedded story: our sample conversations and the tour."""
