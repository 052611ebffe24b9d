"""What each subcommand of `raymill` does; the top floor, which imports all others where it needs them."""
