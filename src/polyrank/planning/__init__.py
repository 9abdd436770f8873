"""What a model costs and which ranks each client affords. Pure."""
