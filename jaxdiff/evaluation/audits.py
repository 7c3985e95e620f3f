"""Bias and failure audits: templates that expand to prompts, and what their images show."""
