"""Combiners: rules that need the rows of the gradient matrix."""
