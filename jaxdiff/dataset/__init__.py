"""Turns a prompt manifest into a finished, verifiable dataset on disk. Imports no JAX.

Data flows through the modules in this order: manifest.manifest and manifest.readers (bytes to raw
rows), manifest.columns and manifest.rows (validation), planning and plan (images, batches, shards),
formats and shard (encoding, writing and commit), ledger (verification), finished.card (README and
Croissant). finished.signing and finished.gallery are optional.
"""
