"""Runs of a method over a data set, their metrics and tables."""
