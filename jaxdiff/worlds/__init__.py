"""Procedural captioned worlds: images that can be drawn without end and judged exactly."""
