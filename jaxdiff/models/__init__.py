"""The networks, one file per published architecture; none depends on a noise schedule."""
