"""What `macko bench` measures."""
