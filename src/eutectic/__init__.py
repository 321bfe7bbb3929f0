"""eutectic: merge checkpoints fine-tuned from one base into one multi-task model."""
