"""Result rows as a Markdown page with tables and pictures."""
