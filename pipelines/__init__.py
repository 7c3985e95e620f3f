"""The Apache Beam jobs. Each is a short linear graph."""
