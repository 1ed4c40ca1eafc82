"""Models in folders, and text from them."""
