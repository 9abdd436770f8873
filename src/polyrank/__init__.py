"""Federated and split fine-tuning of language models with unequal LoRA ranks."""
