"""How it answers: decoding, sampling, the terminal chat."""
