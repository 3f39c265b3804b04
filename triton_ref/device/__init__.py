"""Device functions shared by the kernels."""
