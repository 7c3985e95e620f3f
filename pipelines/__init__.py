"""The Apache Beam jobs, a short linear graph each."""
