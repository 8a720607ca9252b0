"""The report of a model: what was measured, pictures of it, and a page that explains them."""
