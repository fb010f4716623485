"""Meshes, the table of shardings, and starting on many hosts."""
