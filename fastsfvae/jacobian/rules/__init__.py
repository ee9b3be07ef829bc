"""Tangent rules, one per ATen operation."""
