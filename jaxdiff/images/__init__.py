"""Images that others made: safe decoding, addresses, fitting. Imports no JAX."""
