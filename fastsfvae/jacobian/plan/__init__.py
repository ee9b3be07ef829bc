"""From a decoder to its plan."""
