"""Image files: safe decoding, addresses, fitting, encoding with settings. Imports no JAX."""
