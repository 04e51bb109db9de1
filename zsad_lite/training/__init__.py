"""Recipes of the compact models, and what each can do."""
