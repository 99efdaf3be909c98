"""What is done to a video diffusion model, and where: sites, intervention kinds, families, the traced engine."""
