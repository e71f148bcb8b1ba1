"""Diffusion on pixels: the UNet before Stable Diffusion's, without text and without a VAE. See the README.md here."""
