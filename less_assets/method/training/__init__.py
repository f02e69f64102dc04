"""Models, adapters, the LoRA training of warm-up and fine-tuning, and checkpoints from elsewhere."""
