"""The kinds of PEFT's adapters: what each means for a weight, and how its file holds that."""
