"""Build and check the book."""
