"""Everlong: sequence models whose cost stays linear."""
