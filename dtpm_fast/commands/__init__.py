"""The command lines. Each module has `main(argv=None) -> int`; `run` below gives them all the same exit codes."""
