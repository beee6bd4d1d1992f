"""nn.Modules of FLUX.1: transformer, autoencoder, text encoders; and how they are loaded."""
