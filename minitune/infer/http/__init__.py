"""The HTTP side: OpenAI's routes, the tutorial's route, the chat page. No model mathematics."""
