"""How it is learned: the loop, the step, the loss, the optimizer."""
