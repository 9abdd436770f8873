"""The only importer of transformers and peft: loading, sites, LoRA layers, PEFT folders."""
