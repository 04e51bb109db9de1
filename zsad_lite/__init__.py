"""The offline stand-in: a drawn benchmark, and the recipes and measurements of the compact models."""
