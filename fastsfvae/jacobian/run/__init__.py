"""From a plan to numbers."""
