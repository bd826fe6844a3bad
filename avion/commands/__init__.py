"""The programs: a module for each entry point and each tool, with a `main(argv)`."""
