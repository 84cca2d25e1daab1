"""The demos on diffusion: small networks for real digits, trained by this project and then made to forget."""
