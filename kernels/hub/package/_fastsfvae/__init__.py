"""Modules of the library fastsfvae, as they stand there but for imports and operators' names."""
