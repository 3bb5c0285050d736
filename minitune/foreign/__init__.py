"""Other programs' settings in minitune's words: LLaMA-Factory, transformers, PEFT, TRL, ms-swift, axolotl."""
