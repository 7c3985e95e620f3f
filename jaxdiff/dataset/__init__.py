"""From a prompt manifest to a finished, verifiable dataset on disk. Imports no JAX.

The data flows through the files in this order: manifest (bytes to raw rows), rows (validation),
plan (images, batches, shards), images (encoding), formats and shard (writing and commit), ledger
(is it complete?), card (what people read).
"""
