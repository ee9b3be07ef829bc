"""What is made of trained runs: numbers, pages, figures, and comparisons between them."""
