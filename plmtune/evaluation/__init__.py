"""How good a model is: lm-eval's tasks over our models, on a machine with or without a hub."""
