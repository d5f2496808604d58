"""Prompts as text and as tokens."""
