"""From a prompt manifest to a finished, verifiable dataset on disk. Imports no JAX.

The data flows through the files in this order: manifest and manifest_readers (bytes to raw rows),
columns and rows (validation), planning and plan (images, batches, shards), images (encoding),
formats and shard (writing and commit), ledger (is it complete?), card (what people read). Then, if
somebody asks: signing and gallery.
"""
