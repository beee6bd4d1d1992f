"""Caches of latents and text-encoder outputs in Kohya's file format."""
