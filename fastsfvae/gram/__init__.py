"""The Gram of a decoder's Jacobian, and its chunk loop."""
