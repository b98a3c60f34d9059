"""The embedded default: a small model that this project trained, and short stories that it wrote."""
