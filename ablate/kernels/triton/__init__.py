"""The GPU backend: Triton kernels, and the choice of how a shape is cut into them."""
