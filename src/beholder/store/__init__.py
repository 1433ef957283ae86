"""What was computed once and is kept on disk: `rows` (files, index, writers) and `features` (of a frozen tower)."""
