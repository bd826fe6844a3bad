"""What every entry point and every tool does: a module for each, with a `main(argv)`."""
