"""Network modules (adapters to train) and the interface through which the trainer meets any of them."""
