"""The command line: a file a command, each a signature, examples and one library call."""
