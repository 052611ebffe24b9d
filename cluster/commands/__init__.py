"""The subcommands of `raymill`; the top floor, which imports all others inside the functions that
need them."""
