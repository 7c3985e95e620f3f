"""Procedural captioned worlds: unlimited drawn images that can be judged exactly."""
