"""Everything that knows DuckDB and Arrow. Nothing outside this package imports them."""
