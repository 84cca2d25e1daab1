"""What diffusion models need beside tasks and methods: diffusers' folders, trained weights, sampling, grids."""
