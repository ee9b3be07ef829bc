"""A decoder's Jacobian by carrying m tangents through it."""
