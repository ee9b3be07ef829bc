"""`gram_project` and `woodbury` as a kernel of the Hugging Face hub.

`python -m fastsfvae.kernels.hub` writes it. `package/` is what users import, on top of copies of
the library's own modules; `tests/` and `CARD.md` go with it. None of this is installed: it needs a
clone.
"""
