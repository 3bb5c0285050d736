"""What a model can do before and after: held-out loss, answers side by side, habits, tasks, what it forgot."""
