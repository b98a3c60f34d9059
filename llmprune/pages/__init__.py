"""What people look at: measurements of several models side by side, as a page, a model card, or a table."""
