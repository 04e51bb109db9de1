"""Diffusion models: noise levels, latent and pixel models, semantic guidance, loading and converting."""
