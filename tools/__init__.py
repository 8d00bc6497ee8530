"""What the project makes with, and does not ship: run from the root of the repository, in no wheel."""
