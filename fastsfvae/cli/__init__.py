"""The ``fastsfvae`` command."""
