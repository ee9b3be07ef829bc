"""What is made of trained runs: their evaluation, its page, and comparisons between them."""
